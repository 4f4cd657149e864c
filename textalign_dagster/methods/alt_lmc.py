"""ALT_LMC: conditioning on a category out of a closed set (Abadal Lloret et al. 2024)."""

from __future__ import annotations

from typing import Literal

import polars as pl
from pydantic import Field, model_validator

from textalign_dagster.methods.base import ClosedConditional, FeedbackKind


class AltLMC(ClosedConditional):
    """Each sample is trained under the category its judge put it in."""

    name: Literal["alt_lmc"] = "alt_lmc"
    template: str = Field("{condition}.\n\n{prompt}", description="How a category stands before a prompt.")
    categories: tuple[str, ...] = Field(
        (
            "Harmless and very helpful",
            "Harmless and helpful",
            "Harmless and not helpful",
            "Harmful",
        ),
        strict=False,
        min_length=2,
        description="The judge's categories, best first; they are the pool's buckets.",
    )

    @model_validator(mode="after")
    def _distinct(self) -> AltLMC:
        if len(set(self.categories)) < len(self.categories):
            raise ValueError("a category is listed twice in `categories`")
        return self

    @property
    def wants(self) -> FeedbackKind:
        return "category"

    @property
    def buckets(self) -> tuple[str, ...]:
        return self.categories

    def label(self, rows: pl.DataFrame) -> pl.DataFrame:
        # The published code trained on whatever the judge wrote; a label that is no category of ours
        # has no bucket here, and stays out.
        usable = (pl.col("status") == "ok") & pl.col("label").is_in(list(self.categories))
        label = pl.when(usable).then(pl.col("label"))
        return rows.with_columns(label=label, condition=label)
