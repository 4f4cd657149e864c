"""The numbers of an evaluation: those of the task, sample by sample, and the scores computed from them."""

from __future__ import annotations

import polars as pl

from assets.measuring import Measuring
from assets.subjects import Subject
from textalign_dagster.experiment import Experiment
from textalign_dagster.measures import rouge
from textalign_dagster.reports.score_table import reported, sample_values, score_table, with_numbers
from textalign_dagster.tables import EVALUATION_SAMPLES, measures

TASK_COLUMNS = (
    *("sample_id", "prompt_id", "prompt", "reference", "role", "text", "finish_reason", "n_tokens"),
    *("score", "label"),
)
"""The columns that :meth:`textalign_dagster.tasks.Task.measure` is passed."""


UNJUDGED = {
    **{name: pl.lit(None, dtype=pl.Float64) for name in ("score", "judge_value", "judge_unusable")},
    "label": pl.lit(None, dtype=pl.String),
}
"""The columns that scorers and judges fill, if there are any."""


def by_task(experiment: Experiment, samples: pl.DataFrame) -> pl.DataFrame:
    """The task's numbers of samples, scored or not: sample_id and one column per number."""
    # Tasks treat all policies alike, however they were sampled.
    role = pl.col("role").replace({"baseline": "main", "scenario": "main"})
    found = experiment.task.measure(samples.with_columns(role=role).select(TASK_COLUMNS))
    if not experiment.evaluation.rouge or set(rouge.NAMES) <= set(found.columns):
        return found
    own = samples.select("sample_id", *rouge.rouge(samples.select("text", "reference").iter_rows()))
    return found.join(own, on="sample_id", maintain_order="left")


def first_measure(experiment: Experiment, samples: pl.DataFrame, numbers: pl.DataFrame) -> pl.Series:
    """The first measure of the score table, sample by sample; NULL where it is undefined.

    Args:
        samples: as they were scored.
        numbers: of :func:`by_task`.
    """
    return sample_values(with_numbers(samples, numbers), reported(experiment)[0])


def lower_is_better(experiment: Experiment) -> bool:
    """Whether lower is better for the first measure of the score table."""
    return reported(experiment)[0].better != "higher"


def tables(
    measuring: Measuring, subject: Subject, samples: pl.DataFrame, measured: pl.DataFrame
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """A subject's rows of SCORES, and of EVALUATION_SAMPLES.

    Args:
        measured: of :func:`by_task`.
    """
    table = score_table(
        samples.with_columns(condition="asked"),
        measured,
        reported(measuring.experiment),
        policy_hash=subject.policy_hash,
        subject=subject.name,
        resamples=measuring.experiment.evaluation.resamples,
    )
    more = [c for c in ("score", "judge_value") if c not in measured.columns and samples[c].count()]
    numbers = measured.join(samples.select("sample_id", *more), on="sample_id", maintain_order="left")
    listed = numbers.select("sample_id", measures(numbers.drop("sample_id").iter_rows(named=True)))
    rows = samples.with_columns(policy_hash=pl.lit(subject.policy_hash))
    return table, rows.join(listed, on="sample_id", maintain_order="left").select(*EVALUATION_SAMPLES)
