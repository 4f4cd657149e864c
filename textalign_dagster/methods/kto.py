"""Individually good or bad samples, for KTO (Ethayarajh et al. 2024)."""

from __future__ import annotations

from typing import ClassVar, Literal

import polars as pl

from textalign_dagster.methods.thresholds import Thresholded
from textalign_dagster.pool.examples import mismatched, single


class KTO(Thresholded):
    """A sample whose reward reaches a threshold is desirable, the others are not; no pairs are needed."""

    objectives: ClassVar[tuple[str, ...]] = ("kto",)

    name: Literal["kto"] = "kto"

    def examples(self, rows: pl.DataFrame) -> pl.DataFrame:
        rewarded = self.rewarded(rows).with_columns(good=self.good)
        sides = [
            single(rewarded.filter("good"), "chosen"),
            single(rewarded.filter(~pl.col("good")), "rejected"),
        ]
        return mismatched(pl.concat(sides))
