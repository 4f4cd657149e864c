"""Scenarios of an evaluation: the policy sampled in other ways, measured like everything else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import polars as pl

from assets.measuring import Measuring
from assets.numbers import by_task, first_measure, lower_is_better, tables
from assets.subjects import Subject
from resources.store import Draft
from textalign_dagster.experiment import Experiment
from textalign_dagster.measures import statistics
from textalign_dagster.measures.statistics import Estimate
from textalign_dagster.reports.score_table import score_row, text_statistics
from textalign_dagster.tables import SCENARIO_SAMPLES, SCORES


def shown_samples(measuring: Measuring, subject: Subject) -> pl.DataFrame:
    """A scenario's samples as they are measured: with `score_prompt` the prompt is part of the text."""
    assert subject.scenario is not None
    samples = measuring.unread_samples(subject).with_columns(
        nll=pl.lit(None, dtype=pl.Float64), nll_tokens=pl.lit(None, dtype=pl.Int64)
    )
    if not subject.scenario.score_prompt:
        return samples
    return samples.with_columns(prompt=pl.lit(""), text=pl.col("prompt") + pl.col("text"))


def scenario_scores(
    measuring: Measuring,
    draft: Draft,
    scenarios: Sequence[Subject],
    heights: Sequence[int],
    samples: pl.DataFrame,
) -> list[pl.DataFrame]:
    """Writes the samples of scenarios, and returns their rows of SCORES.

    Args:
        heights: the number of samples of each scenario, in order.
        samples: all of them, as they were scored.
    """
    scores, kept, place = [], [], 0
    experiment, settings = measuring.experiment, measuring.experiment.evaluation
    for subject, height in zip(scenarios, heights, strict=True):
        own, place = samples.slice(place, height), place + height
        numbers = by_task(experiment, own)
        table, numbered = tables(measuring, subject, own, numbers)
        values = own.select("prompt_id").with_columns(value=first_measure(experiment, own, numbers))
        worst = list(_worst(experiment, subject, values.drop_nulls(), settings.resamples))
        scores += [table, pl.DataFrame(worst, SCORES)]
        if settings.text_statistics:
            unscored_texts = numbered.with_columns(score=pl.lit(None))  # the worst of 25 exists already
            scores.append(text_statistics(unscored_texts, subject.policy_hash, subject.name))
        kept.append(numbered.with_columns(scenario=pl.lit(subject.name)))
    draft.write("scenario_samples", pl.concat(kept), SCENARIO_SAMPLES)
    return scores


def _worst(
    experiment: Experiment, subject: Subject, values: pl.DataFrame, resamples: int
) -> Iterator[dict[str, object]]:
    """Rows of SCORES: the worst sample, the mean worst of 25, and the share that is worse than `hits`.

    Args:
        values: prompt_id, value: the first measure, sample by sample.
    """
    if values.is_empty():
        return
    scenario, lower = subject.scenario, lower_is_better(experiment)
    known, prompts = values["value"].to_list(), values["prompt_id"].to_list()
    found = {
        "worst": max(known) if lower else min(known),
        "worst_of_25": statistics.worst_of(known, "lower" if lower else "higher"),
    }
    about = {"subject": subject.name, "role": "scenario", "condition": subject.asked[0].condition}
    for metric, number in found.items():
        if number is not None:  # a number computed from all texts together has no interval
            estimate = Estimate(number, None, None, len(set(prompts)), len(known))
            yield score_row(metric, estimate, subject.policy_hash, **about)
    if scenario is not None and scenario.hits is not None:
        hits = [float(value > scenario.hits if lower else value < scenario.hits) for value in known]
        share = statistics.mean(hits, prompts, resamples=resamples)
        yield score_row("hits", share, subject.policy_hash, **about)
