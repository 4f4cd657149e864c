"""Judgments as CUT uses them (Xu et al., 2024, arXiv:2312.14591): a critique, or the word "perfect"."""

from __future__ import annotations

import re
from typing import Any

from textalign_dagster.judging import readings
from textalign_dagster.judging.answers import PERFECT
from textalign_dagster.judging.extract import Unreadable
from textalign_dagster.judging.labels import normalise

# In the published data, such praise is trained on as criticism; no rule can tell which it is.
_PRAISE = re.compile(
    r"\W*(?:perfect\b|(?:the|this|your|its?)\b[^.!?\n]{0,60}?\b(?:is|was|looks|seems)\s+(?:already\s+|absolutely\s+)?perfect\b)",
    re.IGNORECASE,
)


def read_judgment(value: Any) -> str | None:
    """The critique; None: the response is satisfactory (the judgment is "perfect" and nothing else).

    Raises:
        Unreadable: not text, a failure marker (``$ERROR$``), a refusal, or praise that is more than
            the one word.
    """
    if not isinstance(value, str):
        raise Unreadable(f"`judgment` is not text: {readings.excerpt(repr(value))}")
    critique = readings.mended(value).strip()
    if normalise(critique) == PERFECT:
        return None
    if not any(character.isalnum() for character in critique) or readings.is_sentinel(critique):
        raise Unreadable(f"`judgment` has no words: {readings.excerpt(repr(value))}")
    if is_praise(critique):
        raise Unreadable(f'praise, but not the word "{PERFECT}" alone: {readings.excerpt(critique)}')
    if readings.is_refusal(critique):
        raise Unreadable(f"a refusal: {readings.excerpt(critique)}")
    return critique


def is_praise(critique: str) -> bool:
    """Whether a judgment opens by saying that the response is perfect ("almost perfect" is criticism)."""
    return _PRAISE.match(critique) is not None
