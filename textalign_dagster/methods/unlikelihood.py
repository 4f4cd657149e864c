"""Unlikelihood training on the spans that feedback marks in a text (Korbak et al. 2023)."""

from __future__ import annotations

from typing import ClassVar, Literal

from textalign_dagster.methods.base import FeedbackKind, Unconditional


class Unlikelihood(Unconditional):
    """Every sample is trained on: marked spans become less likely, the rest more likely."""

    objectives: ClassVar[tuple[str, ...]] = ("unlikelihood",)

    name: Literal["unlikelihood"] = "unlikelihood"

    @property
    def wants(self) -> FeedbackKind:
        return "spans"
