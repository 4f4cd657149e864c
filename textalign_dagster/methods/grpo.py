"""Policy gradients over a prompt's samples and their rewards (Shao et al. 2024, Ahmadian et al. 2024)."""

from __future__ import annotations

from typing import ClassVar, Literal

import polars as pl

from textalign_dagster.methods.base import Rewarded
from textalign_dagster.pool.examples import groups


class GRPO(Rewarded):
    """All samples of a prompt are one group: those better than the rest become more likely, worse ones less likely."""

    objectives: ClassVar[tuple[str, ...]] = ("grpo", "rloo")

    name: Literal["grpo"] = "grpo"

    def read_together(self, samples_per_prompt: int) -> int:
        return samples_per_prompt

    def examples(self, rows: pl.DataFrame) -> pl.DataFrame:
        return groups(self.rewarded(rows))
