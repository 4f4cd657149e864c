"""Unlikelihood of what feedback marks in a text (Korbak et al. 2023)."""

from __future__ import annotations

from typing import ClassVar, Literal

import polars as pl

from textalign_dagster.methods.base import FeedbackKind, Method


class Unlikelihood(Method):
    """Every sample is trained on: marked stretches become less likely, the rest more."""

    objectives: ClassVar[tuple[str, ...]] = ("unlikelihood",)

    name: Literal["unlikelihood"] = "unlikelihood"

    @property
    def wants(self) -> FeedbackKind:
        return "spans"

    @property
    def buckets(self) -> tuple[str, ...]:
        return ("sample",)

    @property
    def exemplar(self) -> None:
        return None

    def label(self, rows: pl.DataFrame) -> pl.DataFrame:
        usable = pl.col("status") == "ok"
        return rows.with_columns(
            label=pl.when(usable).then(pl.lit(self.buckets[0])), condition=pl.lit(None, dtype=pl.String)
        )
