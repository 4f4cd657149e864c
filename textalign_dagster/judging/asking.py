"""A judge's questions about samples, and the verdicts from its answers.

Every ask works the same way: `asking` builds the questions, the caller gets them answered, `judged` reads
the answers. Nothing here makes calls, so forecasts build the same questions as the stage that pays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import polars as pl

from textalign_dagster.judging.rendering import Call
from textalign_dagster.judging.template import Template
from textalign_dagster.judging.verdict import Reply


@dataclass(frozen=True)
class Question:
    """A call to be made.

    Attributes:
        repeat: 0, 1, … when the same question is repeated.
        order_shown: for a comparison, the samples in the order shown; stored with the reply.
    """

    call: Call
    repeat: int = 0
    order_shown: str | None = None


class Answer(NamedTuple):
    """The reply to a question, and the key of its row in the ledger."""

    reply: Reply
    call_key: str


@dataclass(frozen=True)
class Judged:
    """The verdicts on samples.

    Attributes:
        rows: FEEDBACK, exactly one row per sample, in the order of the samples.
        pairs: PAIRS, where samples were compared.
        repeats: FEEDBACK_REPEATS, where questions were asked several times.
        spans: FEEDBACK_SPANS, where the feedback points into the texts.
        facts: figures on the calls: calls, usd, ….
    """

    rows: pl.DataFrame
    pairs: pl.DataFrame | None = None
    repeats: pl.DataFrame | None = None
    spans: pl.DataFrame | None = None
    facts: dict[str, Any] = field(default_factory=dict)


class Asking(Protocol):
    """The questions about some samples."""

    @property
    def questions(self) -> Sequence[Question]:
        """The questions to ask; answers must be in the same order."""

    def judged(self, answers: Sequence[Answer]) -> Judged:
        """The verdicts from the answers."""


class Sample(NamedTuple):
    """A response with its prompt and the prompt's reference."""

    sample_id: str
    prompt_id: str
    prompt: str
    reference: str | None
    text: str


NO_REFERENCE = "its prompt has no reference"


def samples_of(frame: pl.DataFrame) -> list[Sample]:
    """The rows of a table with (at least) the columns of :class:`Sample`; a blank reference becomes None.

    Raises:
        ValueError: a sample has two rows.
    """
    repeated = frame.filter(pl.col("sample_id").is_duplicated())
    if repeated.height:
        raise ValueError(f"sample {repeated['sample_id'][0]} is listed twice; give one row per sample")
    reference = pl.col("reference").cast(pl.String)
    nonblank = pl.when(reference.str.strip_chars() != "").then(reference)
    chosen = frame.with_columns(reference=nonblank).select(Sample._fields)
    return [Sample._make(row) for row in chosen.iter_rows()]


def shows_reference(template: Template) -> bool:
    """Whether the template shows a reference, so that every question needs one."""
    return "reference" in template.item_fields


def in_order(rows: pl.DataFrame, samples: Sequence[Sample]) -> pl.DataFrame:
    """The rows in the order of the samples."""
    ids = pl.DataFrame({"sample_id": [s.sample_id for s in samples]}, {"sample_id": pl.String})
    ordered = ids.join(rows, on="sample_id", how="left", maintain_order="left")
    assert ordered.height == rows.height == len(samples), "one row per sample"
    return ordered.select(rows.columns)
