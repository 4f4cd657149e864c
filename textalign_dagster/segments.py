"""Documents cut into segments, which are scored one by one: sentences, lines, or the whole.

Segments lie end to end: together they are the document, blanks between sentences included.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import accumulate
from typing import Literal

SegmentKind = Literal["line", "sentence", "document"]

_SENTENCE = re.compile(r".*?[.!?…]+[\"'”’)\]]*(?=\s)\s+|.+", re.S)
"""A sentence ends behind its punctuation, closing quotes and brackets, and has the blanks that follow."""


def cut(text: str, kind: SegmentKind) -> list[tuple[int, int]]:
    """Where the segments of a text begin and end, in characters.

    A sentence is what ends in ``.``, ``!`` or ``?`` before a blank: a rule without a list of abbreviations,
    so "Dr. No" is two.
    """
    if kind == "document":
        return [(0, len(text))] if text else []
    pieces = text.splitlines(keepends=True) if kind == "line" else _SENTENCE.findall(text)
    return list(_places(pieces))


def _places(pieces: list[str]) -> Iterator[tuple[int, int]]:
    ends = list(accumulate(map(len, pieces)))
    return zip([0, *ends], ends, strict=False)


def joined(pieces: list[str]) -> tuple[str, list[tuple[int, int]]]:
    """Segments that were cut elsewhere as a text, and where they are in it."""
    return "".join(pieces), list(_places(pieces))
