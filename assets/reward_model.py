"""Measuring a trained reward model: its rewards for held-out samples beside the feedback on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import dagster as dg
import polars as pl

from assets.stage import Stage
from assets.verdicts import readable_failures
from resources.configured import SamplerResource
from resources.feedback_sources import feedback_of
from resources.rewards.scoring import score_samples
from resources.store import Artifact
from textalign_dagster.experiment.offline import held_out_responses
from textalign_dagster.experiment.sources import task_of
from textalign_dagster.scorers import ImportedScorer, RewardModelScorer


def rewarded_samples(
    stage: Stage, sampler: SamplerResource, checkpoint: Artifact, samples: pl.DataFrame
) -> pl.DataFrame:
    """Feedback and reward of each sample; of a file's held-out responses where the feedback is the file's.

    Args:
        samples: sample_id, prompt_id, prompt, reference, text, finish_reason.

    Returns:
        Rows of :data:`textalign_dagster.tables.REWARDS`, and text.

    Raises:
        dg.Failure: the judge cannot be reached, or too much of its feedback is unusable.
    """
    report = stage.report()
    if stage.experiment.judged_by_file:
        known = held_out_responses(stage.experiment, task_of(stage.experiment))
    else:
        values = _values(stage, samples, partial(report, note="judging"))
        known = samples.join(values, on="sample_id", how="left", maintain_order="left")
    sampler.make_room()
    model = RewardModelScorer(model=str(checkpoint.path("model")), dtype=stage.experiment.policy.dtype)
    shown = known.select("sample_id", "prompt", "reference", "text", "finish_reason")
    with readable_failures(stage):
        rewards = score_samples(model, shown, partial(report, note="rewards"))
    return known.select("sample_id", "prompt_id", "value", "text").join(
        rewards.select("sample_id", reward="value"), on="sample_id", how="left", maintain_order="left"
    )


def _values(stage: Stage, samples: pl.DataFrame, report: Callable[..., None]) -> pl.DataFrame:
    """The usable feedback on samples: sample_id, value."""
    if isinstance(stage.experiment.sample_scorer, ImportedScorer) and stage.experiment.judge is None:
        # Feedback that was collected elsewhere says nothing of these samples.
        return pl.DataFrame(schema={"sample_id": pl.String, "value": pl.Float64})
    with readable_failures(stage):
        judged = feedback_of(
            stage.experiment,
            samples.select("sample_id", "prompt_id", "prompt", "reference", "text", "finish_reason"),
            iteration=stage.cell.iteration,
            store=stage.store,
            report=report,
            purpose=f"{stage.cell.key} evaluation of the reward model",
            retry_before=stage.retry_before,
        ).rows
    unusable = judged["status"].is_in(["failed", "unparseable"]).sum()
    if unusable > stage.experiment.checks.max_unusable_feedback * judged.height:
        raise dg.Failure(
            f"{unusable:,} of {judged.height:,} judgements of held-out samples are unusable (limit: "
            "checks.max_unusable_feedback); `textalign run --retry-failed` sends failed calls again",
            allow_retries=False,
        )
    return judged.filter(status="ok").select("sample_id", "value")
