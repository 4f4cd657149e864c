"""Labels and choices in plain text: matched up to case and punctuation, nothing fuzzier."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_CHOICE = re.compile(
    r"(?:the\s+)?(?:(?:output|response|answer|option|assistant)\s*)?[(\[]?([ab])[)\]]?", re.IGNORECASE
)
# A bare "a" is the article in prose, so a mention needs parentheses or a noun before it.
_CHOICE_NAMED = re.compile(
    r"\(\s*([ab])\s*\)|\b(?:output|response|answer|option|assistant)\s+[(\[]?([ab])\b", re.IGNORECASE
)
_DECORATION = " \t\r\n*_`\"'“”‘’<>#."


def normalise(label: str) -> str:
    """Lower case, punctuation as spaces, spaces collapsed: ``"Harmless, and helpful."`` → ``harmless and helpful``."""
    plain = unicodedata.normalize("NFKC", label).casefold()
    kept = "".join(c if c.isalnum() or unicodedata.category(c)[0] == "M" else " " for c in plain)
    return " ".join(kept.split())


def match_label(text: str, labels: Sequence[str]) -> str | None:
    """The label that equals the whole text, or None."""
    plain = normalise(text)
    return next((label for label in labels if normalise(label) == plain), None)


def named_labels(text: str, labels: Sequence[str]) -> set[str]:
    """The labels that occur in a text; occurrences inside a longer label do not count."""
    rest, found = f" {normalise(text)} ", set()
    for label in sorted(labels, key=lambda label: -len(normalise(label))):
        phrase = f" {normalise(label)} "
        if phrase in rest:
            found.add(label)
            rest = rest.replace(phrase, "  ")
    return found


def match_choice(text: str) -> str | None:
    """ "a" or "b" if the whole text is that choice: ``Output (a)``, ``B.``, ``**Response A**``."""
    match = _CHOICE.fullmatch(text.strip(_DECORATION + "!,:;"))
    return match[1].lower() if match else None


def named_choices(text: str) -> set[str]:
    """The choices that occur in a text."""
    return {(m[1] or m[2]).lower() for m in _CHOICE_NAMED.finditer(text)}
