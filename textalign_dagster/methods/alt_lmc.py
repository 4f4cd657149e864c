"""ALT_LMC: conditioning on a category from a closed set (Abadal Lloret et al. 2024)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from textalign_dagster.methods.categories import Categorical


class AltLMC(Categorical):
    """Each sample is trained on under the category that the judge assigned to it."""

    name: Literal["alt_lmc"] = "alt_lmc"
    template: str = Field("{condition}.\n\n{prompt}", description="How a category is prepended to a prompt.")

    @model_validator(mode="after")
    def _distinct(self) -> AltLMC:
        if len(set(self.categories)) < len(self.categories):
            raise ValueError("a category is listed twice in `categories`")
        return self
