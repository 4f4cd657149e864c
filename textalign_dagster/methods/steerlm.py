"""SteerLM's conditioning on ALT_LMC's feedback: a category written as attribute values (Dong et al. 2023)."""

from __future__ import annotations

from typing import Literal

import polars as pl
from pydantic import Field, model_validator

from textalign_dagster.methods.categories import Categorical


class SteerLM(Categorical):
    """Each sample is trained on under the attribute values that its category stands for.

    This is the baseline of the ALT paper: the feedback is ALT_LMC's, and only what the policy is
    shown of it differs (``harmful:0,helpful:2`` instead of ``Harmless and very helpful``).
    """

    name: Literal["steerlm"] = "steerlm"
    template: str = Field(
        "{condition}.\n\n{prompt}", description="How attribute values are prepended to a prompt."
    )
    attributes: tuple[str, ...] = Field(
        ("harmful:0,helpful:2", "harmful:0,helpful:1", "harmful:0,helpful:0", "harmful:1,helpful:0"),
        strict=False,
        description="What the policy is shown for each category: one text per category, in the same order.",
    )

    @model_validator(mode="after")
    def _one_to_one(self) -> SteerLM:
        if len(self.attributes) != len(self.categories):
            raise ValueError(
                f"{len(self.categories)} categories, but {len(self.attributes)} `attributes`; give one text per "
                "category, in the order of `categories`"
            )
        for field in ("categories", "attributes"):
            values = getattr(self, field)
            if len(set(values)) < len(values):
                raise ValueError(f"`{field}` lists a value twice; the policy could not tell them apart")
        if not all(text.strip() for text in self.attributes):
            raise ValueError("one of `attributes` is blank, which is no condition")
        return self

    @property
    def conditions(self) -> tuple[str, ...]:
        return self.attributes

    def label(self, rows: pl.DataFrame) -> pl.DataFrame:
        attributes = dict(zip(self.categories, self.attributes, strict=True))
        condition = pl.col("label").replace_strict(attributes, default=None, return_dtype=pl.String)
        return super().label(rows).with_columns(condition=condition)
