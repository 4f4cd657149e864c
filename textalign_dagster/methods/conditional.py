"""Control tokens for good and bad samples: conditional training and CSFT."""

from __future__ import annotations

from typing import Literal

import polars as pl
from pydantic import Field

from textalign_dagster.ids import derive_seed
from textalign_dagster.methods.base import ClosedConditional, FeedbackKind


class ControlTokens(ClosedConditional):
    """A method that trains on good and bad samples, each after a new token, and then asks for good ones."""

    @property
    def wants(self) -> FeedbackKind:
        return "reward"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return self.buckets


class ConditionalTraining(ControlTokens):
    """Good by a threshold of the reward (Korbak et al. 2023)."""

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
    def buckets(self) -> tuple[str, ...]:
        return ("<|aligned|>", "<|misaligned|>")

    def label(self, rows: pl.DataFrame) -> pl.DataFrame:
        good, bad = self.buckets
        usable = (pl.col("status") == "ok") & pl.col("value").is_finite()
        token = pl.when(pl.col("value") >= self.threshold).then(pl.lit(good)).otherwise(pl.lit(bad))
        label = pl.when(usable).then(token)
        return rows.with_columns(label=label, condition=label)

    def examples(self, rows: pl.DataFrame) -> pl.DataFrame:
        def dropped(sample_id: str) -> bool:
            return derive_seed(0, "drop condition", sample_id) % 10_000 < 10_000 * self.drop_fraction

        without = rows["sample_id"].map_elements(dropped, return_dtype=pl.Boolean)
        return super().examples(rows.with_columns(condition=pl.when(~without).then(pl.col("condition"))))


class CSFT(ControlTokens):
    """Good and bad by comparison with a sample of the same prompt, the token after it (Ethayarajh et al. 2024).

    Of a prompt's samples the best is compared with the worst, the second best with the second worst, and so
    on; equal rewards make neither good nor bad, and the middle one of an odd number is left out.
    """

    name: Literal["csft"] = "csft"
    template: str = Field("{prompt}{condition}", description="How a control token follows a prompt.")

    @property
    def buckets(self) -> tuple[str, ...]:
        return ("<|good|>", "<|bad|>")

    def label(self, rows: pl.DataFrame) -> pl.DataFrame:
        good, bad = self.buckets
        usable = (pl.col("status") == "ok") & pl.col("value").is_finite()
        ranked = rows.filter(usable).sort("prompt_id", "value", "sample_id")
        counterpart = pl.col("value").reverse().over("prompt_id")
        better, worse = pl.col("value") > counterpart, pl.col("value") < counterpart
        label = pl.when(better).then(pl.lit(good)).when(worse).then(pl.lit(bad))
        labels = ranked.select("sample_id", label=label)
        joined = rows.drop("label", strict=False).join(
            labels, on="sample_id", how="left", maintain_order="left"
        )
        return joined.with_columns(condition="label")
