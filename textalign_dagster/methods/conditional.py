"""Conditional training with control tokens: good or bad by a threshold (Korbak et al. 2023)."""

from __future__ import annotations

from typing import Literal

import polars as pl
from pydantic import Field

from textalign_dagster.ids import derive_seed
from textalign_dagster.methods.base import ClosedConditional, FeedbackKind

GOOD, BAD = "<|aligned|>", "<|misaligned|>"


class ConditionalTraining(ClosedConditional):
    """Samples whose reward reaches a threshold are trained on after one new token, the others after another."""

    name: Literal["conditional"] = "conditional"
    template: str = Field("{condition}{prompt}", description="How a control token stands before a prompt.")
    threshold: float = Field(0.0, description="The lowest reward of a good sample; 0 is a threshold.")
    drop_fraction: float = Field(
        0.01,
        ge=0,
        lt=1,
        description="Share of the samples that are trained on without a control token (drawn by the samples' ids), "
        "so that the policy can be sampled without one.",
    )

    @property
    def wants(self) -> FeedbackKind:
        return "reward"

    @property
    def buckets(self) -> tuple[str, ...]:
        return (GOOD, BAD)

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return self.buckets

    def label(self, rows: pl.DataFrame) -> pl.DataFrame:
        usable = (pl.col("status") == "ok") & pl.col("value").is_finite()
        token = pl.when(pl.col("value") >= self.threshold).then(pl.lit(GOOD)).otherwise(pl.lit(BAD))
        label = pl.when(usable).then(token)
        return rows.with_columns(label=label, condition=label)

    def examples(self, rows: pl.DataFrame) -> pl.DataFrame:
        def dropped(sample_id: str) -> bool:
            return derive_seed(0, "drop condition", sample_id) % 10_000 < 10_000 * self.drop_fraction

        without = rows["sample_id"].map_elements(dropped, return_dtype=pl.Boolean)
        return super().examples(rows.with_columns(condition=pl.when(~without).then(pl.col("condition"))))
