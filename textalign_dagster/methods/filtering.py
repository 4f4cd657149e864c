"""Filtering by reward, and weighting by it: two objectives of Korbak et al. 2023 on the policy's own samples."""

from __future__ import annotations

from typing import Literal

import polars as pl
from pydantic import Field

from textalign_dagster.methods.base import Rewarded
from textalign_dagster.methods.thresholds import Thresholded


class Filtering(Thresholded):
    """Samples whose reward reaches a threshold are trained on, the others are not."""

    name: Literal["filtering"] = "filtering"

    def examples(self, rows: pl.DataFrame) -> pl.DataFrame:
        return super().examples(self.rewarded(rows).filter(self.good))


class RWR(Rewarded):
    """Every sample is trained on, with weight e^(r/β): reward-weighted regression (Peters and Schaal 2007)."""

    name: Literal["rwr"] = "rwr"
    beta: float = Field(
        1.0,
        gt=0,
        description="Rewards are divided by this; smaller values give the best samples more weight.",
    )
    highest: float = Field(
        1000.0, gt=0, description="Weights are capped at this, as in the released code of Korbak et al."
    )

    def examples(self, rows: pl.DataFrame) -> pl.DataFrame:
        weight = (pl.col("value") / self.beta).exp().clip(upper_bound=self.highest)
        return super().examples(self.rewarded(rows).with_columns(weight=pl.col("weight") * weight))
