"""Measuring a policy: which prompts and conditions, and the score table with its intervals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import polars as pl

from textalign_dagster import statistics
from textalign_dagster.diversity import distinct_n_blocks
from textalign_dagster.experiment import Experiment
from textalign_dagster.ids import content_hash, derive_seed
from textalign_dagster.prompts import prompt_id
from textalign_dagster.settings import SettingsError
from textalign_dagster.sources import held_out_prompts, training_prompts
from textalign_dagster.statistics import Estimate
from textalign_dagster.tables import SCORES, conform
from textalign_dagster.tasks import Measure

DISTINCT_BLOCK = 32
"""Samples over which distinct-3 is counted; small, so that an evaluation has many blocks to resample."""

GUARDS: tuple[Measure, ...] = (
    Measure("distinct_3", "distinct-3", "text"),
    Measure("perplexity", "perplexity under the base policy", "nll", "nll_tokens"),
    Measure("n_tokens", "tokens", "n_tokens"),
)
"""Numbers every task reports, for gains that are none: collapse, drift, shortening."""


@dataclass(frozen=True)
class Asked:
    """What a policy is asked for in an evaluation."""

    condition: str | None
    role: Literal["main", "probe"]


def conditions(experiment: Experiment, iteration: int) -> list[Asked]:
    """As the policy is meant to be used, then the probes. The base policy (0) is asked for nothing."""
    if iteration == 0 or experiment.method.exemplar is None:
        return [Asked(None, "main")]
    probes = experiment.method.probes if experiment.evaluation.probe else ()
    return [Asked(experiment.method.exemplar, "main"), *(Asked(probe, "probe") for probe in probes)]


def evaluation_prompts(experiment: Experiment) -> pl.DataFrame:
    """The held-out prompts with the seeds of their samples: the same in every iteration.

    Returns:
        Columns prompt_id, prompt, seeds (a list, one seed a sample). All policies and conditions get
        the same seeds, so that differences between them are not due to luck.

    Raises:
        SettingsError: too few prompts, or some that iterations train on.
    """
    settings = experiment.evaluation
    prompts = held_out_prompts(experiment)["prompt"].to_list()
    source = settings.path or f"the held-out prompts of task {experiment.task.name}"
    shared = set(prompts) & set(training_prompts(experiment)["prompt"])
    if shared:
        raise SettingsError(
            f"evaluation.path: {len(shared)} prompts of {source} are trained on too, e.g. "
            f"{min(shared)!r}; remove them from one of the files"
        )
    if len(prompts) < settings.prompts:
        raise SettingsError(
            f"evaluation.prompts: {settings.prompts} wanted, but there are {len(prompts)} in {source}"
        )
    chosen = prompts[: settings.prompts]
    ids = [prompt_id(prompt) for prompt in chosen]
    return pl.DataFrame(
        {
            "prompt_id": ids,
            "prompt": chosen,
            "seeds": [
                [derive_seed(experiment.seed, "evaluation", i, k) for k in range(settings.samples_per_prompt)]
                for i in ids
            ],
        }
    )


def evaluation_source(prompts: pl.DataFrame) -> str:
    """What :func:`evaluation_prompts` gave, for the key of an evaluation."""
    return content_hash("prompts", prompts["prompt"].to_list())


def score_table(
    samples: pl.DataFrame,
    measured: pl.DataFrame,
    measures: tuple[Measure, ...],
    *,
    policy_hash: str,
    resamples: int,
) -> pl.DataFrame:
    """The scores of a policy, with 95 % intervals from resampling prompts.

    Args:
        samples: sample_id, prompt_id, condition, role, text, n_tokens, nll and nll_tokens
            (NULL where not computed).
        measured: sample_id and the columns that ``measures`` name.

    Returns:
        Rows of :data:`textalign_dagster.tables.SCORES`: every measure and guard, for every condition.
    """
    # In the samples' order: resampling and blocks go by it.
    joined = samples.join(measured, on="sample_id", maintain_order="left")
    rows = []
    groups = joined.partition_by("role", "condition", as_dict=True, maintain_order=True)
    for (role, condition), group in groups.items():
        for measure in (*measures, *GUARDS):
            found = _estimate(group, measure, resamples)
            if found.value is None:
                continue
            rows.append(
                {
                    "policy_hash": policy_hash,
                    "metric": measure.name,
                    "condition": condition,
                    "role": role,
                    "n": found.n,
                    "value": found.value,
                    "lo": found.lo,
                    "hi": found.hi,
                }
            )
    return conform(pl.DataFrame(rows, schema=SCORES), SCORES, "scores")


def _estimate(group: pl.DataFrame, measure: Measure, resamples: int) -> Estimate:
    if measure.name == "distinct_3":
        texts, ids = group["text"].to_list(), group["prompt_id"].to_list()
        return distinct_n_blocks(texts, ids, 3, block=DISTINCT_BLOCK, resamples=resamples)
    if measure.name == "perplexity":
        scored = group.filter(pl.col("nll").is_not_null())
        if scored.is_empty():
            return Estimate(None, None, None, 0, 0)
        nll, tokens, ids = (scored[c].to_list() for c in ("nll", "nll_tokens", "prompt_id"))
        return statistics.perplexity(nll, tokens, ids, resamples=resamples)
    values, ids = (group[measure.numerator] * measure.scale).to_list(), group["prompt_id"].to_list()
    if measure.denominator is None:
        return statistics.mean(values, ids, resamples=resamples)
    sums = statistics.ratio_sums(values, group[measure.denominator].to_list(), ids)
    return statistics.estimate(sums, resamples=resamples)


def value_of(scores: pl.DataFrame, metric: str, role: str = "main") -> float | None:
    """One value of a score table, None where it is not there."""
    found = scores.filter((pl.col("metric") == metric) & (pl.col("role") == role))["value"]
    return float(found[0]) if len(found) else None


def titles(measures: tuple[Measure, ...]) -> Mapping[str, str]:
    """Metric → title, in the order of reporting."""
    return {measure.name: measure.title for measure in (*measures, *GUARDS)}
