"""Counts of keywords and regular expressions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Literal

from pydantic import Field, field_validator, model_validator

from textalign_dagster.ids import content_hash
from textalign_dagster.scorers.base import Span, TextScorer, merge_spans

PATTERNS_VERSION = "1"


class PatternScorer(TextScorer):
    """How often keywords and patterns match in a text; rates are None for a text without characters (or words)."""

    name: Literal["patterns"] = "patterns"
    keywords: tuple[str, ...] = Field((), strict=False, description="Words or phrases, taken literally.")
    patterns: tuple[str, ...] = Field((), strict=False, description="Regular expressions (Python's).")
    ignore_case: bool = Field(True, description="Whether case is ignored.")
    whole_words: bool = Field(True, description="Whether a keyword only matches as a whole word.")
    metric: Literal["any", "count", "per_character", "per_word"] = Field(
        "count",
        description="any: 1 if anything matches, else 0; count: the number of matches; or matches per character or word.",
    )
    good: bool = Field(
        False, description="Whether a match is good (a required phrase) or bad (a banned one)."
    )

    @field_validator("keywords")
    @classmethod
    def _some_letters(cls, keywords: tuple[str, ...]) -> tuple[str, ...]:
        if any(not keyword.strip() for keyword in keywords):
            raise ValueError("a keyword is blank; it would be found everywhere")
        return keywords

    @field_validator("patterns")
    @classmethod
    def _compile(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        for pattern in patterns:
            try:
                compiled = re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None
            if compiled.match("") is not None:
                raise ValueError(f"{pattern!r} matches an empty text; it would be found everywhere")
        return patterns

    @model_validator(mode="after")
    def _something(self) -> PatternScorer:
        if not self.keywords and not self.patterns:
            raise ValueError("keywords, patterns: give at least one keyword or pattern")
        return self

    @property
    def version(self) -> str:
        return f"{PATTERNS_VERSION}+{content_hash('patterns', self.model_dump(mode='json'))[:8]}"

    @property
    def better(self) -> Literal["lower", "higher"]:
        return "higher" if self.good else "lower"

    def spans(self, text: str) -> list[Span]:
        """Matches of keywords and patterns, overlaps merged; the kind is the keyword or pattern."""
        found = [
            Span(match.start(), match.end(), kind)
            for kind, pattern in self._compiled
            for match in pattern.finditer(text)
            if match.end() > match.start()
        ]
        return merge_spans(found, touching=False)

    def score(self, texts: Sequence[str]) -> list[float | None]:
        return [self._score(text) for text in texts]

    def _score(self, text: str) -> float | None:
        found = len(self.spans(text))
        if self.metric in ("any", "count"):
            return float(found) if self.metric == "count" else float(found > 0)
        size = len(text) if self.metric == "per_character" else len(text.split())
        return found / size if size else None

    @cached_property
    def _compiled(self) -> list[tuple[str, re.Pattern[str]]]:
        flags = re.IGNORECASE if self.ignore_case else re.NOFLAG
        edges = (r"(?<!\w)", r"(?!\w)") if self.whole_words else ("", "")
        words = [(k, re.compile(f"{edges[0]}{re.escape(k)}{edges[1]}", flags)) for k in self.keywords]
        return words + [(p, re.compile(p, flags)) for p in self.patterns]
