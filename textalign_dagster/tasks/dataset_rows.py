"""What a task reads from a row, and which rows it refuses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


class BadRow(ValueError):
    """Why a row cannot be a prompt, in the same words for all such rows, because they are counted by it."""


@dataclass(frozen=True)
class Row:
    """What a task reads from a row."""

    prompt: str
    reference: str | None = None
    may_be_held_out: bool = True
    """Whether ``held_out`` may choose it for the evaluation."""


@dataclass
class Refused:
    """Rows left out, counted by reason, with the place and content of the first."""

    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, reason: str, place: str, shown: Any = None) -> None:
        count, first = self.reasons.get(reason, (0, place if shown is None else f"{place}: {_short(shown)}"))
        self.reasons[reason] = count + 1, first

    @property
    def count(self) -> int:
        return sum(count for count, _ in self.reasons.values())

    def __str__(self) -> str:
        return "; ".join(f"{count} × {reason} ({first})" for reason, (count, first) in self.reasons.items())


def value_at(values: Mapping[str, Any], places: Sequence[str]) -> Any:
    """The value at the first of the places that the row has; None without one."""
    for place in places:
        found: Any = values
        for step in place.split("."):
            found = found.get(step) if isinstance(found, Mapping) else None
        if found is not None:
            return found
    return None


def _short(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def text_of(values: Mapping[str, Any], name: str) -> str:
    """A text that the row must have.

    Raises:
        BadRow: it is missing, not text, or blank.
    """
    found = values[name]
    if found is None:
        raise BadRow(f"no {name}")
    if not isinstance(found, str):
        raise BadRow(f"{name} is not text")
    if not found.strip():
        raise BadRow(f"a blank {name}")
    return found


def optional_text_of(values: Mapping[str, Any], name: str) -> str | None:
    """An optional text of the row; None for a missing or blank one.

    Raises:
        BadRow: it is not text.
    """
    found = values[name]
    if found is not None and not isinstance(found, str):
        raise BadRow(f"{name} is not text")
    return found if found and found.strip() else None
