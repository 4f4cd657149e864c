"""Measuring a trained reward model: its rewards for held-out samples beside the feedback on them."""

from __future__ import annotations

from functools import partial

import dagster as dg
import polars as pl

from assets.stage import Stage
from assets.verdicts import readable_failures
from resources.configured import SamplerResource
from resources.feedback_sources import feedback_of
from resources.rewards.scoring import score_samples
from resources.store import Artifact
from textalign_dagster.scorers import ImportedScorer, RewardModelScorer


def rewarded_samples(
    stage: Stage, sampler: SamplerResource, checkpoint: Artifact, samples: pl.DataFrame
) -> pl.DataFrame:
    """Feedback and reward of each sample, rows of :data:`textalign_dagster.tables.REWARDS`.

    Args:
        samples: sample_id, prompt_id, prompt, reference, text, finish_reason.

    Raises:
        dg.Failure: the judge cannot be reached, or too much of its feedback is unusable.
    """
    columns = ("sample_id", "prompt_id", "prompt", "reference", "text", "finish_reason")
    shown, report = samples.select(columns), stage.report()
    values = pl.DataFrame(schema={"sample_id": pl.String, "value": pl.Float64})
    # Feedback that was collected elsewhere says nothing of these samples.
    if not isinstance(stage.experiment.sample_scorer, ImportedScorer) or stage.experiment.judge is not None:
        with readable_failures(stage):
            judged = feedback_of(
                stage.experiment,
                shown,
                iteration=stage.cell.iteration,
                store=stage.store,
                report=partial(report, note="judging"),
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
        values = judged.filter(status="ok").select("sample_id", "value")
    sampler.make_room()
    model = RewardModelScorer(model=str(checkpoint.path("model")), dtype=stage.experiment.policy.dtype)
    with readable_failures(stage):
        rewards = score_samples(model, shown.drop("prompt_id"), partial(report, note="rewards"))
    return (
        samples.select("sample_id", "prompt_id")
        .join(values, on="sample_id", how="left", maintain_order="left")
        .join(rewards.select("sample_id", reward="value"), on="sample_id", how="left", maintain_order="left")
    )
