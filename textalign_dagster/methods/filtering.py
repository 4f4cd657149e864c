"""Filtering by reward, and weighing by it: two objectives of Korbak et al. 2023 on the policy's own samples."""

from __future__ import annotations

from typing import Literal, Self

import polars as pl
from pydantic import Field, model_validator

from textalign_dagster.methods.base import Rewarded


class Filtering(Rewarded):
    """Samples whose reward reaches a threshold are trained on, the others are not."""

    name: Literal["filtering"] = "filtering"
    threshold: float | None = Field(
        None, description="The lowest reward that is trained on; 0 is a threshold."
    )
    quantile: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Instead of `threshold`: this share of the drawn samples has lower rewards than what is "
        "trained on (0.5: from the median up).",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.threshold is not None and self.quantile is not None:
            raise ValueError("`threshold` and `quantile` exclude each other; remove one of them")
        return self

    def examples(self, rows: pl.DataFrame) -> pl.DataFrame:
        share = 0.5 if self.quantile is None else self.quantile
        lowest = pl.col("value").quantile(share, "nearest") if self.threshold is None else self.threshold
        return super().examples(self.rewarded(rows).filter(pl.col("value") >= lowest))


class RWR(Rewarded):
    """Every sample is trained on, with weight e^(r/β): reward-weighted regression (Peters and Schaal 2007)."""

    name: Literal["rwr"] = "rwr"
    beta: float = Field(1.0, gt=0, description="Rewards are divided by it; smaller: the best count for more.")
    highest: float = Field(
        1000.0, gt=0, description="Weights are cut off here, as in the released code of Korbak et al."
    )

    def examples(self, rows: pl.DataFrame) -> pl.DataFrame:
        weight = (pl.col("value") / self.beta).exp().clip(upper_bound=self.highest)
        return super().examples(self.rewarded(rows).with_columns(weight=pl.col("weight") * weight))
