"""Summaries of forum posts, as in TL;DR (Völske et al., 2017; Stiennon et al., 2020).

A prompt is a post that ends with the cue ``TL;DR:``; the policy continues after it. How good
a summary is, is up to a reward model or a judge. The measures here need neither.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import polars as pl

from textalign_dagster.measures.rouge import rouge
from textalign_dagster.tasks import word_diversity
from textalign_dagster.tasks.base import Measure
from textalign_dagster.tasks.dataset import DatasetTask
from textalign_dagster.tasks.dataset_rows import BadRow, Row, optional_text_of, text_of

CUE = "TL;DR:"
"""The end of every prompt. A post can contain it, too: nothing here splits a text at it."""


class Summarization(DatasetTask):
    """Posts and their summaries, in the schema of the TL;DR dataset: `prompt` and `label`."""

    name: Literal["summarization"] = "summarization"

    @property
    def columns(self) -> Mapping[str, tuple[str, ...]]:
        return {"prompt": ("prompt",), "reference": ("label", "reference", "summary")}

    def row(self, values: Mapping[str, Any]) -> Row:
        try:
            prompt = self.cleaned(text_of(values, "prompt"))
        except ValueError as error:
            raise BadRow(str(error)) from None
        return Row(prompt, optional_text_of(values, "reference"))

    def cleaned(self, prompt: str) -> str:
        """The post without surrounding blanks; it must end with the cue, or the policy would continue the post."""
        stripped = prompt.strip()
        if not stripped.endswith(CUE):
            raise ValueError(f"the prompt does not end with {CUE!r}")
        if not stripped.removesuffix(CUE).strip():
            raise ValueError("there is no post before the cue")
        return stripped

    def measure(self, samples: pl.DataFrame) -> pl.DataFrame:
        """ROUGE is NULL without a reference (or with one without words), the score without a scorer."""
        return samples.select(
            "sample_id",
            pl.col("score").cast(pl.Float64),
            *rouge(samples.select("text", "reference").iter_rows()),
            words=pl.col("text").str.count_matches(r"\S+").cast(pl.Float64),
            cut_off=(pl.col("finish_reason") == "length").cast(pl.Float64),
        ).join(word_diversity.pooled(samples), on="sample_id", maintain_order="left")

    @property
    def measures(self) -> tuple[Measure, ...]:
        return (
            Measure("score", "score", "score", better="higher"),
            Measure("rouge_1", "ROUGE-1", "rouge_1", better="higher"),
            Measure("rouge_2", "ROUGE-2", "rouge_2", better="higher"),
            Measure("rouge_l", "ROUGE-L", "rouge_l", better="higher"),
            Measure("words", "words", "words"),
            Measure("cut_off", "summaries cut off", "cut_off", better="lower"),
            *word_diversity.pooled_measures(),
        )
