"""Cuts documents into segments that are scored one by one: sentences, lines, or the whole document.

Segments are contiguous: joined, they are the document, including whitespace between sentences.
"""

from __future__ import annotations

import re
from itertools import accumulate, pairwise
from typing import Literal

SegmentKind = Literal["line", "sentence", "document"]

_SENTENCE = re.compile(r".*?[.!?…]+[\"'”’)\]]*(?=\s)\s+|.+", re.S)
"""A sentence includes its final punctuation, closing quotes and brackets, and the whitespace that follows."""


def cut(text: str, kind: SegmentKind) -> list[tuple[int, int]]:
    """The segments of a text as (start, end), in characters.

    A sentence ends at ``.``, ``!``, ``?`` or ``…`` before whitespace; there is no list of abbreviations,
    so "Dr. No" is two.
    """
    if kind == "document":
        return [(0, len(text))] if text else []
    pieces = text.splitlines(keepends=True) if kind == "line" else _SENTENCE.findall(text)
    return _places(pieces)


def joined(pieces: list[str]) -> tuple[str, list[tuple[int, int]]]:
    """The text of segments that were cut elsewhere, and the (start, end) of each in it."""
    return "".join(pieces), _places(pieces)


def _places(pieces: list[str]) -> list[tuple[int, int]]:
    return list(pairwise(accumulate(map(len, pieces), initial=0)))
