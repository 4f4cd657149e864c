"""The source of feedback on samples: an LLM judge, a scorer, or the task itself."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

import polars as pl

from resources.engines.sampler import Sampler
from resources.rewards.trained import located
from resources.store import ArtifactStore
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.offline import offline_feedback
from textalign_dagster.experiment.sources import task_of
from textalign_dagster.judging import Judged
from textalign_dagster.scorers import JudgeModel


def feedback_of(
    experiment: Experiment,
    samples: pl.DataFrame,
    *,
    iteration: int,
    store: ArtifactStore,
    report: Callable[..., None],
    purpose: str,
    retry_before: datetime | None = None,
    engine: Callable[[], Sampler] | None = None,
) -> Judged:
    """The feedback that the experiment's method needs, one row per sample.

    A judge takes precedence over a scorer, a scorer over the file that the samples come from, and the file over
    the task. For a method that needs no feedback, every row is ``skipped``.

    Args:
        samples: sample_id, draw_id, prompt_id, prompt, reference, text, finish_reason.
        purpose: stored in the ledger of judge calls.
        retry_before: judge calls that were given up before this time are sent again.
        engine: returns the engine that a judge model generates with; required only for judge models.

    Raises:
        JudgeError, ScoringError: no feedback can be obtained; the message says why.
    """
    task, kind = experiment.task, experiment.method.wants
    if kind is None:
        return Judged(_rows(_no_feedback(samples), "none", task.scorer))
    if experiment.judge is not None:
        from resources.judges.ask import ask_judge  # requires the extra `judges`

        return ask_judge(
            experiment.judge,
            samples,
            kind=kind,
            store=store,
            report=report,
            purpose=purpose,
            retry_before=retry_before,
        )
    if experiment.corpus is not None:
        from resources.segment_scores import segment_feedback

        return segment_feedback(experiment, samples, kind, store, report)
    if experiment.judged_by_file:
        draws = samples.select("draw_id", "prompt_id", "prompt").unique("draw_id", maintain_order=True)
        return offline_feedback(experiment, task_of(experiment), draws, kind)
    scorer = experiment.sample_scorer
    if scorer is not None:
        from resources.judge_models import written_judgments
        from resources.rewards.scoring import score_samples  # the only module that loads scorers' models

        facts: dict[str, Any] = {}
        found = located(scorer, store)
        if isinstance(found, JudgeModel):
            assert engine is not None, "a judge model needs an engine"
            rows = written_judgments(
                found, samples, engine(), report, trust_remote_code=experiment.policy.trust_remote_code
            ).with_columns(value=pl.lit(None, dtype=pl.Float64))
        else:
            rows = score_samples(found, samples, report, iteration=iteration, facts=facts).drop("score")
        rows = rows.with_columns(aspect=pl.lit(scorer.name))
        return Judged(_rows(rows, kind, (scorer.name, scorer.version)), facts=facts)
    spans = task.spans(samples) if kind == "spans" else None
    return Judged(_rows(task.feedback(samples, kind), kind, task.scorer), spans=spans)


def _rows(judged: pl.DataFrame, kind: str, scorer: tuple[str, str]) -> pl.DataFrame:
    """Judgements made without an LLM judge, as rows of FEEDBACK."""
    name, version = scorer
    return judged.with_columns(
        kind=pl.lit(kind),
        scorer=pl.lit(name),
        scorer_version=pl.lit(version),
        parser_version=pl.lit(None, dtype=pl.String),
        call_keys=pl.lit([], dtype=pl.List(pl.String)),
    )


def _no_feedback(samples: pl.DataFrame) -> pl.DataFrame:
    return samples.select(
        "sample_id",
        aspect=pl.lit("none"),
        value=pl.lit(None, dtype=pl.Float64),
        label=pl.lit(None, dtype=pl.String),
        text=pl.lit(None, dtype=pl.String),
        status=pl.lit("skipped"),
        reason=pl.lit("the method needs no feedback"),
    )
