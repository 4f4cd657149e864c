"""Feedback on a corpus: how bad each segment of a document is; a document is scored by the mean of its segments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import polars as pl

from resources.rewards.scoring import score_samples
from resources.rewards.trained import located
from resources.store import ArtifactStore
from textalign_dagster.experiment import Experiment, corpus
from textalign_dagster.experiment.sources import task_of
from textalign_dagster.judging import Judged
from textalign_dagster.methods import FeedbackKind
from textalign_dagster.tables import FEEDBACK, FEEDBACK_SPANS

ASPECT = "segments"


def segment_feedback(
    experiment: Experiment,
    samples: pl.DataFrame,
    kind: FeedbackKind,
    store: ArtifactStore,
    report: Callable[..., None],
) -> Judged:
    """One row of FEEDBACK per document, its ``value`` the negated mean score of its segments; and these as spans.

    A segment's score is the one in the file; else the negated value from the experiment's scorer; without a
    scorer, what the task marks in it per character, else the task's negated reward. Blank segments have score 0.
    A document with a segment that cannot be scored is ``failed``, and has no spans.

    Args:
        samples: sample_id, draw_id, prompt_id, prompt, reference, text, finish_reason of a corpus.

    Raises:
        ScoringError: a model is missing, cannot be used, or fails its check.
    """
    offline = experiment.corpus
    assert offline is not None, "only for corpora"
    draws = samples.select("draw_id", "prompt_id").unique("draw_id", maintain_order=True)
    pieces = corpus.segments(offline, draws).with_row_index("place")
    facts: dict[str, Any] = {"segments": pieces.height}
    if corpus.scored_elsewhere(offline):
        known, scorer = pieces.with_columns(why=pl.lit(None, dtype=pl.String)), ("corpus", "")
    else:
        known, scorer = _scored(experiment, samples, pieces, store, report, facts)
    documents = known.group_by("sample_id", maintain_order=True).agg(
        value=-pl.col("score").mean(),
        why=pl.col("why").drop_nulls().first(),
        left=pl.col("score").null_count(),
    )
    joined = samples.select("sample_id").join(documents, on="sample_id", how="left", maintain_order="left")
    good = pl.col("left") == 0
    rows = joined.select(
        "sample_id",
        value=pl.when(good).then("value"),
        status=pl.when(good).then(pl.lit("ok")).otherwise(pl.lit("failed")),
        reason=pl.when(~good).then(pl.coalesce("why", pl.lit("a segment has no score"))),
        kind=pl.lit(kind),
        aspect=pl.lit(ASPECT),
        label=pl.lit(None, dtype=pl.String),
        text=pl.lit(None, dtype=pl.String),
        scorer=pl.lit(scorer[0]),
        scorer_version=pl.lit(scorer[1]),
        parser_version=pl.lit(None, dtype=pl.String),
        call_keys=pl.lit([], dtype=pl.List(pl.String)),
    ).select(*FEEDBACK)
    usable = rows.filter(status="ok")["sample_id"].implode()
    spans = known.filter(pl.col("sample_id").is_in(usable)).select(
        "sample_id", "start", "end", "score", aspect=pl.lit(ASPECT), label=pl.lit(offline.segments)
    )
    return Judged(rows, spans=spans.select(*FEEDBACK_SPANS), facts=facts)


def _scored(
    experiment: Experiment,
    samples: pl.DataFrame,
    pieces: pl.DataFrame,
    store: ArtifactStore,
    report: Callable[..., None],
    facts: dict[str, Any],
) -> tuple[pl.DataFrame, tuple[str, str]]:
    """The pieces with their ``score``, or ``why`` they have none; and the scorer's name and version."""
    task, scorer = task_of(experiment), experiment.sample_scorer
    none = pl.lit(None, dtype=pl.String)
    if scorer is None and "spans" in task.kinds:
        marks = task.spans(samples).select("sample_id", at="start", mark="score")
        sums = (
            pieces.join(marks, on="sample_id")
            .filter((pl.col("at") >= pl.col("start")) & (pl.col("at") < pl.col("end")))
            .group_by("place")
            .agg(pl.col("mark").sum())
        )
        density = pl.col("mark").fill_null(0.0) / (pl.col("end") - pl.col("start"))
        found = pieces.join(sums, on="place", how="left", maintain_order="left")
        return found.with_columns(score=density, why=none), task.scorer
    shown = pieces.filter(pl.col("text").str.strip_chars() != "").select(
        "text",
        sample_id=pl.col("place").cast(pl.String),
        prompt=pl.lit(""),
        reference=none,
        finish_reason=pl.lit("stop"),
    )
    if scorer is None:
        answers, who = task.feedback(shown, "reward"), task.scorer
    else:
        answers = score_samples(located(scorer, store), shown, report, facts=facts)
        who = scorer.name, scorer.version
    scores = answers.select(
        place=pl.col("sample_id").cast(pl.UInt32),
        found=pl.when(status="ok").then(-pl.col("value")),
        why=pl.when(pl.col("status") != "ok").then(pl.coalesce("reason", "status")),
        asked=pl.lit(True),
    )
    known = pieces.join(scores, on="place", how="left", maintain_order="left")
    return known.with_columns(score=pl.when("asked").then("found").otherwise(0.0)), who
