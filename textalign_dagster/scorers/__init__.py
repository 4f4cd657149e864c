"""Scorers: numbers (or feedback) for samples, without an LLM judge. Name and version are stored with every score."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from textalign_dagster.scorers.base import Scorer
from textalign_dagster.scorers.imported import ImportedScorer
from textalign_dagster.scorers.judge_models import JudgeModel
from textalign_dagster.scorers.models import ClassifierScorer, ModelScorer, RewardModelScorer
from textalign_dagster.scorers.patterns import PatternScorer
from textalign_dagster.scorers.pii import PIIScorer
from textalign_dagster.scorers.toxicity import ToxicityScorer

AnyScorer = Annotated[
    PatternScorer
    | PIIScorer
    | ToxicityScorer
    | ClassifierScorer
    | RewardModelScorer
    | JudgeModel
    | ImportedScorer,
    Field(discriminator="name"),
]

__all__ = [
    "AnyScorer",
    "ClassifierScorer",
    "ImportedScorer",
    "JudgeModel",
    "ModelScorer",
    "PIIScorer",
    "PatternScorer",
    "RewardModelScorer",
    "Scorer",
    "ToxicityScorer",
]
