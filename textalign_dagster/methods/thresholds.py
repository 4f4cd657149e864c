"""Good or not, by a reward threshold: shared by filtering and KTO."""

from __future__ import annotations

from typing import Self

import polars as pl
from pydantic import Field, model_validator

from textalign_dagster.methods.base import Rewarded


class Thresholded(Rewarded):
    """A method for which a sample is good if its reward reaches a threshold."""

    threshold: float | None = Field(
        None, description="The lowest reward of a good sample; 0 is a threshold, too."
    )
    quantile: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Instead of `threshold`: the share of the drawn samples that are not good, lowest rewards first "
        "(0.5, the default: good from the median up).",
    )

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if self.threshold is not None and self.quantile is not None:
            raise ValueError("`threshold` and `quantile` are mutually exclusive; remove one of them")
        return self

    @property
    def good(self) -> pl.Expr:
        """Whether a row's value reaches the threshold, Boolean."""
        share = 0.5 if self.quantile is None else self.quantile
        lowest = pl.col("value").quantile(share, "nearest") if self.threshold is None else self.threshold
        return pl.col("value") >= lowest
