"""ALT_LMU: conditioning on unconstrained textual feedback (Abadal Lloret et al. 2024)."""

from __future__ import annotations

from typing import Literal

import polars as pl
from pydantic import Field, model_validator

from textalign_dagster.methods.base import Conditional, ExemplarPolicy, FeedbackKind


class AltLMU(Conditional):
    """Each sample is trained under its own feedback sentence; its score only balances the pool."""

    name: Literal["alt_lmu"] = "alt_lmu"
    template: str = Field(
        "feedback: {condition} input: {prompt}",
        description="How a feedback sentence stands before a prompt.",
    )
    scores: tuple[int, ...] = Field(
        (3, 2, 1, 0),
        strict=False,
        min_length=2,
        description="The feedback's possible scores, best first; they are the pool's buckets.",
    )
    exemplar_policy: ExemplarPolicy = Field(
        "static",
        description="The condition from iteration 2 on, and in evaluations: none (the bare prompt), "
        "static (the text in `ask_for`), varied (for each prompt a sentence out of the datapool's best "
        "bucket, drawn by seed). `exemplar` for short.",
    )
    probe: tuple[str, ...] = Field(
        (),
        strict=False,
        description="Other feedback to evaluate under, from better to worse: does the policy obey?",
    )

    @model_validator(mode="after")
    def _consistent(self) -> AltLMU:
        if len(set(self.scores)) < len(self.scores):
            raise ValueError("a score is listed twice in `scores`")
        if self.exemplar_policy == "best":
            raise ValueError(
                "exemplar: best: the samples of the best score have different sentences; say `static` (and "
                "which, in `ask_for`) or `varied`"
            )
        if self.ask_for in self.probe:
            raise ValueError("`probe` repeats `ask_for`; a probe asks for something else")
        return self

    @property
    def wants(self) -> FeedbackKind:
        return "text"

    @property
    def buckets(self) -> tuple[str, ...]:
        return tuple(str(score) for score in self.scores)

    @property
    def best(self) -> None:
        return None

    @property
    def probes(self) -> tuple[str, ...]:
        return self.probe

    def label(self, rows: pl.DataFrame) -> pl.DataFrame:
        # Published code truncates (2.9 -> 2) and never checks the range; a value that is not a bucket
        # of ours must not be trained on, so it stays without a label.
        score = pl.col("value").cast(pl.Int64).cast(pl.String)
        usable = (pl.col("status") == "ok") & score.is_in(list(self.buckets))
        return rows.with_columns(
            label=pl.when(usable).then(score), condition=pl.when(usable).then(pl.col("text"))
        )
