"""What a judge is asked about samples, and what its replies say of them.

One way for every ask: `asking` makes the questions, the caller gets them answered, `judged` reads the
answers. Nothing here calls anybody, so forecasts ask the same questions as the stage that pays.
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
        repeat: 0, 1, … when the same is asked again.
        order_shown: of a comparison, the samples in the order shown; kept with the reply.
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
        rows: FEEDBACK, exactly one row a sample, in the order of the samples.
        pairs: PAIRS, where samples were compared.
        repeats: FEEDBACK_REPEATS, where questions were asked several times.
        spans: FEEDBACK_SPANS, where the feedback points into the texts.
        facts: what it took: calls, usd, ….
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
        """What to ask; the answers belong in the same order."""

    def judged(self, answers: Sequence[Answer]) -> Judged:
        """What the answers say."""


class Sample(NamedTuple):
    """A response and what it answers."""

    sample_id: str
    prompt_id: str
    prompt: str
    reference: str | None
    text: str


NO_REFERENCE = "its prompt has no reference"


def samples_of(frame: pl.DataFrame) -> list[Sample]:
    """The rows of a table with (at least) the columns of :class:`Sample`; a blank reference is none.

    Raises:
        ValueError: a sample has two rows.
    """
    twice = frame.filter(pl.col("sample_id").is_duplicated())
    if twice.height:
        raise ValueError(f"sample {twice['sample_id'][0]} is listed twice; give one row per sample")
    reference = pl.col("reference").cast(pl.String)
    said = pl.when(reference.str.strip_chars() != "").then(reference)
    chosen = frame.with_columns(reference=said).select(Sample._fields)
    return [Sample._make(row) for row in chosen.iter_rows()]


def shows_reference(template: Template) -> bool:
    """Whether every question of the template needs a reference to show."""
    return "reference" in template.item_fields


def in_order(rows: pl.DataFrame, samples: Sequence[Sample]) -> pl.DataFrame:
    """The rows in the order of the samples."""
    ids = pl.DataFrame({"sample_id": [s.sample_id for s in samples]}, {"sample_id": pl.String})
    ordered = ids.join(rows, on="sample_id", how="left", maintain_order="left")
    assert ordered.height == rows.height == len(samples), "one row a sample"
    return ordered.select(rows.columns)
