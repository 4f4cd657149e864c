"""The null control: the same samples, the same training, and no feedback at all."""

from __future__ import annotations

from typing import Literal

import polars as pl

from textalign_dagster.methods.base import Unconditional


class NoFeedback(Unconditional):
    """Trains on the policy's own samples, unconditioned and unfiltered.

    Whatever this improves is not due to feedback: training on a policy's own samples alone can
    sharpen or shorten them, and a curve that also falls here is no evidence.
    """

    name: Literal["no_feedback"] = "no_feedback"

    @property
    def wants(self) -> None:
        return None

    @property
    def buckets(self) -> tuple[str, ...]:
        return ("own sample",)

    def label(self, rows: pl.DataFrame) -> pl.DataFrame:
        return rows.with_columns(label=pl.lit(self.buckets[0]), condition=pl.lit(None, dtype=pl.String))
