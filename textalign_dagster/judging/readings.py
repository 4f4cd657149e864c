"""Reading single values in an answer: numbers, text, and what is not an answer at all."""

from __future__ import annotations

import math
import re
from typing import Any

from textalign_dagster.judging.extract import Unreadable
from textalign_dagster.judging.template import Scale

_DIGITS = r"[+-]?[0-9]{1,12}(?:\.[0-9]{1,12})?"
_NUMBER = re.compile(
    rf"[\s*_`\"'“(\[<]*({_DIGITS})(?:\s*(?:/|out\s+of|of)\s*({_DIGITS}))?(?:\s*(?:points?|stars?)\b)?[*_`\"'”)\]>]*",
    re.IGNORECASE,
)
_REMARK = re.compile(r"\s*(?:[.!]?\s*$|[.,;:(–—]\s*[^\d\s].*|-\s+[^\d\s].*)", re.DOTALL)
_HEDGE = re.compile(r"\b(?:or|to|and|maybe|perhaps|rather)\s+[0-9]", re.IGNORECASE)

_SENTINEL = re.compile(r"\W*(?:error|n\s*/\s*a|none|null|nan|undefined)\W*", re.IGNORECASE)

_REFUSALS = re.compile(
    r"\W*(?:"
    r"(?:i\s*am|i'm|we're|we\s+are)\s+(?:unable|not\s+able)\b"
    r"|(?:(?:i\s*am|i'm|we're|we\s+are)\s+)?(?:very\s+|really\s+|so\s+)?(?:sorry|afraid|apologies|i\s+apologi[sz]e)\b"
    r"(?:\W*$|.{0,60}\b(?:can't|cannot|can\s+not|won't|unable|not\s+able|not\s+comfortable|decline)\b)"
    r"|i\s+(?:can't|cannot|can\s+not|won't|will\s+not|must\s+decline|decline|don't\s+feel\s+comfortable)\b"
    r"|as\s+an\s+ai\b.{0,60}\b(?:can't|cannot|can\s+not|won't|unable|not\s+able|don't)\b"
    r"|this\s+(?:request|content|prompt)\s+(?:violates|goes\s+against)\b"
    r")",
    re.IGNORECASE | re.DOTALL,
)


def is_refusal(text: str) -> bool:
    """Whether a reply begins like a common refusal; checked only when it holds no verdict."""
    return _REFUSALS.match(text.replace("’", "'")) is not None


def is_sentinel(text: str) -> bool:
    """Whether a text is a failure marker (``$ERROR$``, ``N/A``)."""
    return _SENTINEL.fullmatch(text) is not None


def number_in_words(text: str, scale: Scale, alone: bool = False) -> float | None:
    """The number that a text begins with; None: it begins with something else.

    ``7``, ``7/7``, ``2 out of 3``, ``<2>``, ``**6**``, and, unless ``alone``, ``6. Because …``.

    Raises:
        Unreadable: it begins with a number that is not on the scale, or with more than one.
    """
    match = _NUMBER.match(text)
    if match is None:
        return None
    rest = text[match.end() :]
    if alone and rest.strip() not in ("", ".", "!"):
        return None
    if _REMARK.fullmatch(rest.split("\n", 1)[0]) is None or _HEDGE.search(rest.split("\n", 1)[0]):
        raise Unreadable(f"no single number: {excerpt(text)}")
    if match[2] is not None and float(match[2]) != scale.high:
        raise Unreadable(f"{excerpt(match[0])}: out of {match[2]}, but the scale ends at {scale.high:g}")
    return on_scale(float(match[1]), scale)


def number(value: Any, scale: Scale) -> float:
    """A JSON value as a number on the scale; texts such as ``"2/3"`` are read too.

    Raises:
        Unreadable: it is not a number on the scale.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise Unreadable(f"not a number: {excerpt(repr(value))}")
    if isinstance(value, str):
        found = number_in_words(value, scale, alone=True)
        if found is None:
            raise Unreadable(f"not a number: {excerpt(repr(value))}")
        return found
    try:
        return on_scale(float(value), scale)
    except OverflowError:
        raise Unreadable(f"outside {scale.low:g} to {scale.high:g}: a number with many digits") from None


def on_scale(value: float, scale: Scale) -> float:
    """The value itself, if it is on the scale.

    Raises:
        Unreadable: out of range, or not whole where whole numbers are required.
    """
    if not math.isfinite(value) or not scale.low <= value <= scale.high:
        raise Unreadable(f"{value:g} is outside {scale.low:g} to {scale.high:g}")
    if scale.integer and not value.is_integer():
        raise Unreadable(f"{value:g} is not a whole number")
    return value


def words(value: Any, name: str) -> str:
    """A text field with whitespace collapsed (a condition is one line).

    Raises:
        Unreadable: not text, without a letter or digit, or a failure marker.
    """
    if not isinstance(value, str):
        raise Unreadable(f"`{name}` is not text: {excerpt(repr(value))}")
    plain = " ".join(mended(value).split()).strip('<>*"“” ')
    if not any(character.isalnum() for character in plain) or is_sentinel(plain):
        raise Unreadable(f"`{name}` has no words: {excerpt(repr(value))}")
    return plain


def mended(text: str) -> str:
    """The text with lone surrogates (a character cut in two) replaced: tables hold UTF-8."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def excerpt(text: str, length: int = 60) -> str:
    """The start of a text, on one line."""
    line = " ".join(text.split())
    return line if len(line) <= length else line[: length - 1] + "…"
