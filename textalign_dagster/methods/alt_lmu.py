"""ALT_LMU: conditioning on unconstrained textual feedback (Abadal Lloret et al. 2024)."""

from __future__ import annotations

from typing import Literal

import polars as pl
from pydantic import Field, model_validator

from textalign_dagster.methods.base import Conditional, ExemplarPolicy, FeedbackKind


class AltLMU(Conditional):
    """Each sample is trained on under its own feedback sentence; its score only serves to balance the pool."""

    name: Literal["alt_lmu"] = "alt_lmu"
    template: str = Field(
        "feedback: {condition} input: {prompt}",
        description="How a feedback sentence is prepended to a prompt.",
    )
    scores: tuple[int, ...] = Field(
        (3, 2, 1, 0),
        strict=False,
        min_length=2,
        description="Possible scores of the feedback, best first; these are the pool's buckets.",
    )
    exemplar_policy: ExemplarPolicy = Field(
        "static",
        description="The condition from iteration 2 on, and in evaluations: none (the bare prompt), "
        "static (the text in `ask_for`), varied (one sentence per prompt, drawn by seed from the datapool's "
        "best bucket). Short form: `exemplar`.",
    )
    probe: tuple[str, ...] = Field(
        (),
        strict=False,
        description="Other feedback to evaluate under, from better to worse, to test whether the policy follows it.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> AltLMU:
        if len(set(self.scores)) < len(self.scores):
            raise ValueError("a score is listed twice in `scores`")
        if self.exemplar_policy == "best":
            raise ValueError(
                "exemplar: best: samples with the best score have different sentences; use `static` (with the "
                "sentence in `ask_for`) or `varied`"
            )
        if self.ask_for in self.probe:
            raise ValueError("`probe` repeats `ask_for`; a probe must be a different condition")
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
        # The published code truncates (2.9 -> 2) and never checks the range; a value that is not one of
        # our buckets must not be trained on, so it gets no label.
        score = pl.col("value").cast(pl.Int64).cast(pl.String)
        usable = (pl.col("status") == "ok") & score.is_in(list(self.buckets))
        return rows.with_columns(
            label=pl.when(usable).then(score), condition=pl.when(usable).then(pl.col("text"))
        )
