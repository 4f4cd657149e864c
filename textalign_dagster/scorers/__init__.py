"""Programmatic scorers: numbers from texts, without a judge. Name and version go with every score."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from textalign_dagster.scorers.base import Scorer, Span, merge_spans
from textalign_dagster.scorers.patterns import PatternScorer
from textalign_dagster.scorers.pii import PIIScorer

AnyScorer = Annotated[PatternScorer | PIIScorer, Field(discriminator="name")]

__all__ = ["AnyScorer", "PIIScorer", "PatternScorer", "Scorer", "Span", "merge_spans"]
