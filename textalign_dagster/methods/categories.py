"""Shared by ALT_LMC and its SteerLM baseline: a judge's categories, best first, as the pool's buckets."""

from __future__ import annotations

import polars as pl
from pydantic import Field

from textalign_dagster.methods.base import ClosedConditional, FeedbackKind

CATEGORIES = ("Harmless and very helpful", "Harmless and helpful", "Harmless and not helpful", "Harmful")
"""ALT_LMC's categories, best first."""


class Categorical(ClosedConditional):
    """A method whose judge assigns each sample a category from a closed set."""

    categories: tuple[str, ...] = Field(
        CATEGORIES,
        strict=False,
        min_length=2,
        description="The judge's categories, best first; these are the pool's buckets.",
    )

    @property
    def wants(self) -> FeedbackKind:
        return "category"

    @property
    def buckets(self) -> tuple[str, ...]:
        return self.categories

    def label(self, rows: pl.DataFrame) -> pl.DataFrame:
        # The published code trained on whatever the judge wrote; here, a label that is not one of the
        # categories has no bucket and is left out.
        usable = (pl.col("status") == "ok") & pl.col("label").is_in(list(self.categories))
        label = pl.when(usable).then(pl.col("label")).cast(pl.String)
        return rows.with_columns(label=label, condition=label)
