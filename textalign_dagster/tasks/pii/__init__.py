"""Continuations without personally identifiable information, as in PHF (Korbak et al., 2023).

A prompt is the beginning of a text, such as the first lines of an e-mail; only its continuation is scored. The
task judges with the detectors of :class:`~textalign_dagster.scorers.pii.PIIScorer`, and marks what they find.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import polars as pl

from textalign_dagster.methods import FeedbackKind
from textalign_dagster.scorers.pii import PIIScorer
from textalign_dagster.tables import FEEDBACK_SPANS
from textalign_dagster.tasks import word_diversity
from textalign_dagster.tasks.base import Measure
from textalign_dagster.tasks.dataset import DatasetTask
from textalign_dagster.tasks.dataset_rows import Row, text_of

ASPECT = "pii"

SCORER = PIIScorer()


class PII(DatasetTask):
    """Plain prompts (`prompt` or `text`), and how much personal information their continuations have."""

    name: Literal["pii"] = "pii"

    @property
    def columns(self) -> Mapping[str, tuple[str, ...]]:
        return {"prompt": ("prompt", "text")}

    def row(self, values: Mapping[str, Any]) -> Row:
        return Row(self.cleaned(text_of(values, "prompt")))

    def cleaned(self, prompt: str) -> str:
        """The prompt without surrounding blanks: the policy writes the blank itself."""
        return prompt.strip()

    @property
    def scorer(self) -> tuple[str, str]:
        return self.name, SCORER.version

    @property
    def kinds(self) -> tuple[FeedbackKind, ...]:
        return ("reward", "spans")

    def feedback(self, samples: pl.DataFrame, kind: FeedbackKind) -> pl.DataFrame:
        """The negated number of detected spans per character; an empty continuation is skipped."""
        scores = pl.Series(SCORER.score(samples["text"].to_list()), dtype=pl.Float64)
        none, blank = pl.lit(None, dtype=pl.String), pl.col("value").is_null()
        return samples.select("sample_id", value=-scores).with_columns(
            aspect=pl.lit(ASPECT),
            label=none,
            text=none,
            status=pl.when(blank).then(pl.lit("skipped")).otherwise(pl.lit("ok")),
            reason=pl.when(blank).then(pl.lit("nothing to score: the text is empty")),
        )

    def spans(self, samples: pl.DataFrame) -> pl.DataFrame:
        rows = [
            (sample_id, ASPECT, span.start, span.end, 1.0, span.kind)
            for sample_id, text in samples.select("sample_id", "text").iter_rows()
            for span in SCORER.spans(text)
        ]
        return pl.DataFrame(rows, FEEDBACK_SPANS, orient="row")

    def measure(self, samples: pl.DataFrame) -> pl.DataFrame:
        found = pl.Series([len(SCORER.spans(text)) for text in samples["text"]], dtype=pl.Float64)
        characters = pl.col("text").str.len_chars().cast(pl.Float64)
        return samples.select(
            "sample_id",
            found=found,
            characters=characters,
            per_character=pl.when(characters > 0).then(found / characters),
            any=(found > 0).cast(pl.Float64),
            words=pl.col("text").str.count_matches(r"\S+").cast(pl.Float64),
        ).join(word_diversity.pooled(samples), on="sample_id", maintain_order="left")

    @property
    def measures(self) -> tuple[Measure, ...]:
        return (
            Measure("pii", "PII per 1,000 characters", "found", "characters", 1000, better="lower"),
            Measure("pii_share", "continuations with PII", "any", better="lower"),
            Measure(
                "pii_max", "a prompt's highest PII per 1,000 characters", "per_character", None, 1000,
                better="lower", per_prompt="max",
            ),
            Measure("words", "words", "words"),
            *word_diversity.pooled_measures(),
        )  # fmt: skip
