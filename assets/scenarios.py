"""Scenarios of an evaluation: the policy sampled in other ways, measured like everything else."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from assets.measuring import Measuring, Subject
from textalign_dagster.experiment.experiment import Experiment
from textalign_dagster.measures import statistics
from textalign_dagster.measures.statistics import Estimate
from textalign_dagster.reports.score_table import reported, score_row


def shown_samples(measuring: Measuring, subject: Subject) -> pl.DataFrame:
    """A scenario's samples as they are measured: with `score_prompt` the prompt is part of the text."""
    assert subject.scenario is not None
    samples = measuring.unread_samples(subject)
    if not subject.scenario.score_prompt:
        return samples
    return samples.with_columns(prompt=pl.lit(""), text=pl.col("prompt") + pl.col("text"))


def worst_scores(
    experiment: Experiment, subject: Subject, samples: pl.DataFrame, resamples: int
) -> Iterator[dict[str, object]]:
    """Rows of SCORES: the worst sample, the mean worst one of 25, and the share that is worse than `hits`.

    Each is of the first measure of the score table, sample by sample.

    Args:
        samples: prompt_id, condition, and the columns that the measure names.
    """
    scenario, first = subject.scenario, reported(experiment)[0]
    assert scenario is not None
    value = pl.col(first.numerator).cast(pl.Float64) * first.scale
    if first.denominator is not None:
        value = pl.when(pl.col(first.denominator) != 0).then(value / pl.col(first.denominator))
    known = samples.select("prompt_id", value=value).drop_nulls()
    values, prompts = known["value"].to_list(), known["prompt_id"].to_list()
    if not values:
        return
    lower = first.better != "higher"
    found = {
        "worst": max(values) if lower else min(values),
        "worst_of_25": statistics.worst_of(values, "lower" if lower else "higher"),
    }
    about = {"subject": subject.name, "role": "scenario", "condition": subject.asked[0].condition}
    for metric, number in found.items():
        if number is not None:  # a number of all texts together has no interval
            estimate = Estimate(number, None, None, len(set(prompts)), len(values))
            yield score_row(metric, estimate, subject.policy_hash, **about)
    if scenario.hits is not None:
        hits = [float(value > scenario.hits if lower else value < scenario.hits) for value in values]
        yield score_row(
            "hits", statistics.mean(hits, prompts, resamples=resamples), subject.policy_hash, **about
        )
