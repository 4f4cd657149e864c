"""Contrastive unlikelihood training: learning from judgments in words (Xu et al. 2024)."""

from __future__ import annotations

import re
from typing import ClassVar, Literal

import polars as pl
from pydantic import Field

from textalign_dagster.ids import content_hash
from textalign_dagster.methods.base import FeedbackKind, Unconditional


class CUT(Unconditional):
    """A sample with a judgment is trained on under the judgment and, token by token, under its bare prompt; a sample
    that satisfies the judge only under its bare prompt."""

    objectives: ClassVar[tuple[str, ...]] = ("cut", "nll")
    """With ``nll``, judged samples are only trained on under their judgment: learning in hindsight."""

    name: Literal["cut"] = "cut"
    template: str = Field(
        "Judgment: {condition}\n{prompt}", description="How a judgment is prepended to a prompt in training."
    )
    satisfied: tuple[str, ...] = Field(
        ("perfect",),
        strict=False,
        description="A judgment finds no fault if its label is one of these words or its text begins with one "
        "(ignoring case and leading punctuation).",
    )
    satisfied_score: float | None = Field(
        None, description="Feedback with this score or a higher one finds no fault, whatever its text."
    )
    satisfied_per_judged: float | None = Field(
        0.25,
        ge=0,
        description="Maximum number of samples without fault to train on for each sample with a judgment "
        "(chosen by sample id); null: all.",
    )

    @property
    def wants(self) -> FeedbackKind:
        return "judgment"

    @property
    def buckets(self) -> tuple[str, ...]:
        return ("satisfied", "judged")

    def label(self, rows: pl.DataFrame) -> pl.DataFrame:
        opening = (rf"^\W*{re.escape(word.lower())}(\W|$)" for word in self.satisfied)
        begins = [pl.col("text").str.to_lowercase().str.contains(pattern) for pattern in opening]
        satisfied = pl.any_horizontal(pl.col("label").is_in(list(self.satisfied)), *begins).fill_null(False)
        if self.satisfied_score is not None:
            satisfied |= (pl.col("value") >= self.satisfied_score).fill_null(False)
        blank = pl.col("text").fill_null("").str.strip_chars() == ""
        usable = (pl.col("status") == "ok") & (satisfied | ~blank)
        return rows.with_columns(
            label=pl.when(usable & satisfied).then(pl.lit("satisfied")).when(usable).then(pl.lit("judged")),
            condition=pl.when(usable & ~satisfied).then(pl.col("text")),
        )

    def examples(self, rows: pl.DataFrame) -> pl.DataFrame:
        judged = pl.col("condition").is_not_null()
        return (
            super()
            .examples(self.thinned(rows))
            .with_columns(second_prompt=pl.when(judged).then(pl.col("prompt")))
        )

    def thinned(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The rows, with no more samples without fault than ``satisfied_per_judged`` allows."""
        judged = pl.col("condition").is_not_null()
        if self.satisfied_per_judged is not None:
            satisfied = rows.filter(~judged)["sample_id"]
            room = int((rows.height - len(satisfied)) * self.satisfied_per_judged)
            drawn = sorted(satisfied, key=lambda sample_id: content_hash("cut", sample_id))[:room]
            rows = rows.filter(judged | pl.col("sample_id").is_in(drawn))
        return rows
