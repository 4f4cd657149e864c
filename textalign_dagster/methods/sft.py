"""Supervised fine-tuning on the best samples: RAFT (Dong et al. 2023) and rejection sampling (Touvron et al. 2023)."""

from __future__ import annotations

from typing import Literal

import polars as pl
from pydantic import Field

from textalign_dagster.methods.base import Rewarded


class SFT(Rewarded):
    """Only each prompt's samples with the highest rewards are trained on."""

    name: Literal["sft"] = "sft"
    best: int = Field(1, ge=1, description="Samples per prompt that are trained on, highest rewards first.")

    def examples(self, rows: pl.DataFrame) -> pl.DataFrame:
        ranked = self.rewarded(rows).sort("prompt_id", "value", "sample_id", descending=[False, True, False])
        return super().examples(ranked.group_by("prompt_id", maintain_order=True).head(self.best))
