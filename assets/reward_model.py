"""Measuring a trained reward model: its rewards for held-out samples compared with the feedback on them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

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
from textalign_dagster.judging import Judged
from textalign_dagster.scorers import ImportedScorer, RewardModelScorer
from textalign_dagster.tables import FEEDBACK


class Rewarded(NamedTuple):
    """Samples with feedback and reward.

    Attributes:
        rows: of :data:`textalign_dagster.tables.REWARDS`, and text.
        repeats, pairs: FEEDBACK_REPEATS and PAIRS, where a judge gave them.
    """

    rows: pl.DataFrame
    repeats: pl.DataFrame | None = None
    pairs: pl.DataFrame | None = None


def rewarded_samples(
    stage: Stage, sampler: SamplerResource, checkpoint: Artifact, samples: pl.DataFrame
) -> Rewarded:
    """Feedback and reward of each sample, or of a file's held-out responses if the feedback is from that file.

    Args:
        samples: sample_id, prompt_id, prompt, reference, text, finish_reason.

    Raises:
        dg.Failure: the judge cannot be reached, or too much of its feedback is unusable.
    """
    report, judged = stage.report(), Judged(pl.DataFrame(schema=FEEDBACK))
    if stage.experiment.judged_by_file:
        known = held_out_responses(stage.experiment, task_of(stage.experiment))
    else:
        judged = _judged(stage, samples, report) or judged
        values = judged.rows.filter(status="ok").select("sample_id", "value")
        known = samples.join(values, on="sample_id", how="left", maintain_order="left")
    sampler.make_room()
    model = RewardModelScorer(model=str(checkpoint.path("model")), dtype=stage.experiment.policy.dtype)
    shown = known.select("sample_id", "prompt", "reference", "text", "finish_reason")
    with readable_failures(stage):
        rewards = score_samples(model, shown, partial(report, note="rewards"))
    rewarded = known.select("sample_id", "prompt_id", "value", "text").join(
        rewards.select("sample_id", reward="value"), on="sample_id", how="left", maintain_order="left"
    )
    return Rewarded(rewarded, judged.repeats, judged.pairs)


def _judged(stage: Stage, samples: pl.DataFrame, report: Callable[..., None]) -> Judged | None:
    """The feedback on samples; None if there is none."""
    if isinstance(stage.experiment.sample_scorer, ImportedScorer) and stage.experiment.judge is None:
        return None  # feedback that was collected elsewhere does not cover these samples
    with readable_failures(stage):
        found = feedback_of(
            stage.experiment,
            samples.select("sample_id", "prompt_id", "prompt", "reference", "text", "finish_reason"),
            iteration=stage.cell.iteration,
            store=stage.store,
            report=report,
            purpose=f"{stage.cell.key} evaluation of the reward model",
            retry_before=stage.retry_before,
        )
    judged = found.rows
    unusable = judged["status"].is_in(["failed", "unparseable"]).sum()
    if unusable > stage.experiment.checks.max_unusable_feedback * judged.height:
        raise dg.Failure(
            f"{unusable:,} of {judged.height:,} judgements of held-out samples are unusable (limit: "
            "checks.max_unusable_feedback); `textalign run --retry-failed` sends failed calls again",
            allow_retries=False,
        )
    return found
