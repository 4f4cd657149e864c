"""Learning to judge: a sample becomes the prompt, its judgment the target (a baseline of Xu et al. 2024)."""

from __future__ import annotations

from typing import ClassVar, Literal

import polars as pl
from pydantic import Field

from textalign_dagster.methods.cut import CUT
from textalign_dagster.tables import SPAN


class ForwardPrediction(CUT):
    """The policy learns to write the judgment of a sample, or that it has no fault (the first word of `satisfied`)."""

    objectives: ClassVar[tuple[str, ...]] = ("nll",)

    name: Literal["forward_prediction"] = "forward_prediction"  # type: ignore[assignment]
    question: str = Field("\nJudgment: ", min_length=1, description="Text between a sample and its judgment.")

    def examples(self, rows: pl.DataFrame) -> pl.DataFrame:
        questions = self.thinned(rows).with_columns(
            prompt=pl.col("prompt") + pl.col("text") + pl.lit(self.question),
            text=pl.coalesce("condition", pl.lit(self.satisfied[0])),
            condition=pl.lit(None, dtype=pl.String),
            finish_reason=pl.lit("stop"),
            spans=pl.lit([], dtype=pl.List(SPAN)),
        )
        return super(CUT, self).examples(questions)
