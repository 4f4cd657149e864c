"""Advantage-weighted regression on the spans that feedback marks in a text (Korbak et al. 2023)."""

from __future__ import annotations

from typing import ClassVar, Literal

from textalign_dagster.methods.base import FeedbackKind, Unconditional


class AWR(Unconditional):
    """Every sample is trained on; the better a token's span is than expected there, the larger its weight."""

    objectives: ClassVar[tuple[str, ...]] = ("awr",)

    name: Literal["awr"] = "awr"

    @property
    def wants(self) -> FeedbackKind:
        return "spans"
