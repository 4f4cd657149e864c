"""The embedded task: continue Python functions in the style of PEP 8.

Prompts come from this machine's own standard library, feedback from pycodestyle, and the base
policy ships with the project. Its style was made sloppy on purpose (see ``policy/README.md``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import polars as pl
from pydantic import Field

from textalign_dagster.methods import FeedbackKind
from textalign_dagster.tables import FEEDBACK_SPANS
from textalign_dagster.tasks.base import Measure, Task
from textalign_dagster.tasks.pep8 import corpus
from textalign_dagster.tasks.pep8.lint import Lint, category, columns, feedback, lint, reward, score, spans

POLICIES = {"pep8-sloppy-1m": Path(__file__).parent / "policy"}


class Pep8(Task):
    """Violations per 1,000 characters, as counted by pycodestyle."""

    name: Literal["pep8"] = "pep8"
    max_prompts: int | None = Field(
        None, ge=1, description="Use only this many prompts of each split, from the first on; null: all."
    )

    def prompts(self, split: Literal["train", "evaluation"]) -> pl.DataFrame:
        found = corpus.prompts()
        texts = found.train if split == "train" else found.evaluation
        return pl.DataFrame({"prompt": texts[: self.max_prompts]}, {"prompt": pl.String}).select(
            "prompt",
            reference=pl.lit(None, dtype=pl.String),
            source=pl.lit("python standard library"),
            source_revision=pl.lit(found.source_revision),
        )

    @property
    def scorer(self) -> tuple[str, str]:
        return "pycodestyle", version("pycodestyle")

    @property
    def kinds(self) -> tuple[FeedbackKind, ...]:
        return ("reward", "text", "category", "judgment", "spans")

    def feedback(self, samples: pl.DataFrame, kind: FeedbackKind) -> pl.DataFrame:
        """``reward``, ``spans``: the negated violations per line. Otherwise a score 0–3, together with: for ``text``
        the findings as a sentence, for ``category`` the score in words, for ``judgment`` the findings or "perfect"."""

        def row(found: Lint) -> dict[str, Any]:
            flawed = reward(found) < 0
            judgment = "flawed" if flawed else "perfect"
            labels = {"category": category(found), "judgment": judgment}
            return {
                "aspect": "style",
                "value": float(reward(found) if kind in ("reward", "spans") else score(found)),
                "label": labels.get(kind),
                "text": feedback(found) if kind == "text" or (kind == "judgment" and flawed) else None,
            }

        return self._rows(samples, row).with_columns(
            pl.col("label", "text").cast(pl.String),
            status=pl.lit("ok"),  # a linter always answers; an empty body is judged as such
            reason=pl.lit(None, dtype=pl.String),
        )

    def spans(self, samples: pl.DataFrame) -> pl.DataFrame:
        """The tokens that violations point at, each with score 1."""
        rows = [
            (sample_id, "style", start, end, 1.0, code)
            for sample_id, prompt, found in _linted(samples)
            for start, end, code in spans(found, prompt)
        ]
        return pl.DataFrame(rows, FEEDBACK_SPANS, orient="row")

    def measure(self, samples: pl.DataFrame) -> pl.DataFrame:
        measured = self._rows(samples, columns)
        return measured.with_columns(pl.exclude("sample_id").cast(pl.Float64))

    @property
    def measures(self) -> tuple[Measure, ...]:
        return (
            Measure(
                "violations", "violations per 1,000 characters", "violations", "characters", 1000, "lower"
            ),
            Measure("clean", "clean samples", "clean", better="higher"),
            Measure("parse_rate", "samples that parse", "parses"),
            Measure("characters", "characters", "characters"),
        )

    def builtin_policy(self, name: str) -> str | None:
        return str(POLICIES[name]) if name in POLICIES else None

    @property
    def builtin_policies(self) -> tuple[str, ...]:
        return tuple(POLICIES)

    def _rows(self, samples: pl.DataFrame, row: Callable[[Lint], dict[str, Any]]) -> pl.DataFrame:
        rows = [{"sample_id": sample_id, **row(found)} for sample_id, _, found in _linted(samples)]
        return pl.DataFrame(rows, infer_schema_length=None)


def _linted(samples: pl.DataFrame) -> Iterator[tuple[str, str, Lint]]:
    """sample_id, prompt and findings of each sample."""
    for sample_id, prompt, text, reason in samples.select(
        "sample_id", "prompt", "text", "finish_reason"
    ).iter_rows():
        yield sample_id, prompt, lint(prompt, text, finished=reason == "stop")
