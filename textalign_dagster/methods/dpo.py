"""Preference pairs from rewards, for DPO and its relatives (Rafailov et al. 2023)."""

from __future__ import annotations

from typing import ClassVar, Literal

import polars as pl
from pydantic import Field

from textalign_dagster.methods.base import PAIRS_FROM, PairsFrom, Rewarded
from textalign_dagster.pool.examples import compared, pairs


class DPO(Rewarded):
    """Pairs of a prompt's samples: the one with the higher reward is chosen, the other rejected."""

    objectives: ClassVar[tuple[str, ...]] = ("dpo", "ipo", "simpo")

    name: Literal["dpo"] = "dpo"
    pairs_per_prompt: int = Field(
        1,
        ge=1,
        description="Pairs of a prompt, at most: the best with the worst sample, the second best with "
        "the second worst, …",
    )
    margin: float = Field(0.0, ge=0, description="A pair needs a larger difference of rewards than this.")
    pairs_from: PairsFrom = Field("rewards", description=PAIRS_FROM)

    def read_together(self, samples_per_prompt: int) -> int:
        return 2

    def examples(self, rows: pl.DataFrame) -> pl.DataFrame:
        if self.pairs_from == "comparisons":
            return compared(rows)
        return pairs(rows, per_prompt=self.pairs_per_prompt, margin=self.margin)
