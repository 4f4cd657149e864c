"""How well a reward model agrees with feedback on samples it was not trained on."""

from __future__ import annotations

import numpy as np
import polars as pl

from textalign_dagster.measures.bootstrap import RESAMPLES, Estimate, estimate, ratio_sums
from textalign_dagster.measures.correlation import correlation

BINS = 10
"""Bins of equal width over the probability that a pair's first text is the better one."""


TITLES = {
    "pair_accuracy": "pair accuracy",
    "rank_correlation": "rank correlation with the feedback",
    "calibration_error": "calibration error",
    "longer_preferred": "excess preference for the longer text",
}
"""Metric → title, in the order of reporting."""


def reward_model_scores(samples: pl.DataFrame, resamples: int = RESAMPLES) -> list[tuple[str, Estimate]]:
    """Every metric of :data:`TITLES` that is defined.

    Args:
        samples: see :func:`decided_pairs`.
    """
    pairs = decided_pairs(samples)
    error, prompts = calibration_error(pairs), pairs["prompt_id"].n_unique()
    found = {
        "pair_accuracy": pair_accuracy(pairs, resamples=resamples),
        "rank_correlation": rank_correlation(samples, resamples=resamples),
        "calibration_error": Estimate(error, None, None, prompts, pairs.height),
        "longer_preferred": longer_preferred(pairs, resamples=resamples),
    }
    return [(name, one) for name, one in found.items() if one.value is not None]


def decided_pairs(samples: pl.DataFrame) -> pl.DataFrame:
    """Pairs of a prompt's samples with different feedback, the better one first.

    Args:
        samples: sample_id, prompt_id, text, value (feedback, higher is better), reward (of the model); rows
            without a finite value or reward are left out.

    Returns:
        prompt_id, margin (the better text's reward minus the worse one's), longer (whether the better text has
        more characters; NULL: as many).
    """
    known = samples.filter(pl.col("value").is_finite() & pl.col("reward").is_finite())
    sides = known.select("prompt_id", "sample_id", "value", "reward", length=pl.col("text").str.len_chars())
    longer = pl.when(pl.col("length") != pl.col("length_worse")).then(
        pl.col("length") > pl.col("length_worse")
    )
    return (
        sides.join(sides, on="prompt_id", suffix="_worse")
        .filter(pl.col("value") > pl.col("value_worse"))
        .select("prompt_id", margin=pl.col("reward") - pl.col("reward_worse"), longer=longer)
    )


def pair_accuracy(pairs: pl.DataFrame, *, resamples: int = RESAMPLES) -> Estimate:
    """The share of pairs whose better text has the higher reward; equal rewards count a half."""
    right = pairs.select(
        pl.when(pl.col("margin") == 0).then(0.5).otherwise((pl.col("margin") > 0).cast(pl.Float64))
    ).to_series()
    sums = ratio_sums(right.to_list(), np.ones(pairs.height), pairs["prompt_id"].to_list())
    return estimate(sums, resamples=resamples)


def longer_preferred(pairs: pl.DataFrame, *, resamples: int = RESAMPLES) -> Estimate:
    """How much more often the model prefers the longer text than the feedback does, in [-1, 1]; 0: no bias."""
    known = pairs.drop_nulls("longer")
    model = (
        pl.when(pl.col("margin") == 0)
        .then(0.5)
        .otherwise(((pl.col("margin") > 0) == pl.col("longer")).cast(pl.Float64))
    )
    excess = known.select(model - pl.col("longer").cast(pl.Float64)).to_series()
    sums = ratio_sums(excess.to_list(), np.ones(known.height), known["prompt_id"].to_list())
    return estimate(sums, resamples=resamples)


def calibration_error(pairs: pl.DataFrame) -> float | None:
    """Expected calibration error (Guo et al. 2017) of σ(reward − reward) as the probability to be the better text.

    Each pair counts in both orders, so a model that says 1/2 of everything has error 0. None without pairs.
    """
    if pairs.is_empty():
        return None
    margins = pairs["margin"].to_numpy()
    probability = 1 / (1 + np.exp(-np.clip(np.concatenate([margins, -margins]), -500, 500)))
    better = np.concatenate([np.ones(margins.size), np.zeros(margins.size)])
    at = np.minimum((probability * BINS).astype(int), BINS - 1)
    gaps = np.bincount(at, weights=probability - better, minlength=BINS)
    return float(np.abs(gaps).sum() / probability.size)


def rank_correlation(samples: pl.DataFrame, *, resamples: int = RESAMPLES) -> Estimate:
    """Spearman's correlation of reward and feedback over all samples."""
    known = samples.filter(pl.col("value").is_finite() & pl.col("reward").is_finite())
    columns = (known[name].to_list() for name in ("value", "reward", "prompt_id"))
    value, reward, prompts = columns
    return correlation(value, reward, prompts, "spearman", resamples=resamples)
