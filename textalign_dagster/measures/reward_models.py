"""How well a reward model agrees with feedback on samples it was not trained on."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import polars as pl

from textalign_dagster.measures.bootstrap import RESAMPLES, Estimate, mean
from textalign_dagster.measures.correlation import correlation

BINS = 10
"""Number of equal-width bins over the probability that a pair's first text is the better one."""


TITLES = {
    "pair_accuracy": "pair accuracy",
    "rank_correlation": "rank correlation with the feedback",
    "calibration_error": "calibration error",
    "judge_consistency": "consistency of the judge",
    "longer_preferred": "excess preference for the longer text",
}
"""Metric → title, in reporting order."""


def reward_model_scores(
    samples: pl.DataFrame,
    resamples: int = RESAMPLES,
    *,
    repeats: pl.DataFrame | None = None,
    comparisons: pl.DataFrame | None = None,
) -> list[tuple[str, Estimate]]:
    """Every metric of :data:`TITLES` that is defined.

    Args:
        samples: see :func:`decided_pairs`.
        repeats: see :func:`judge_consistency`, without prompt_id and text.
        comparisons: see :func:`order_consistency`.
    """
    pairs = decided_pairs(samples)
    error, prompts = calibration_error(pairs), pairs["prompt_id"].n_unique()
    found = {
        "pair_accuracy": pair_accuracy(pairs, resamples=resamples),
        "rank_correlation": rank_correlation(samples, resamples=resamples),
        "calibration_error": Estimate(error, None, None, prompts, pairs.height),
        "longer_preferred": longer_preferred(pairs, resamples=resamples),
    }
    if repeats is not None:
        known = repeats.join(samples.select("sample_id", "prompt_id", "text"), on="sample_id")
        found["judge_consistency"] = judge_consistency(known, resamples=resamples)
    elif comparisons is not None:
        found["judge_consistency"] = order_consistency(comparisons, resamples=resamples)
    return [(name, one) for name, one in found.items() if one.value is not None]


def decided_pairs(samples: pl.DataFrame) -> pl.DataFrame:
    """Pairs of a prompt's samples with different feedback, the better one first.

    Args:
        samples: sample_id, prompt_id, text, value (feedback, higher is better), reward (of the model); rows
            without a finite value or reward are left out.

    Returns:
        prompt_id, margin (the better text's reward minus the worse one's), longer (whether the better text has
        more characters; NULL: equally many).
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
    """The share of pairs whose better text has the higher reward; equal rewards count 1/2."""
    right = pairs.select(
        pl.when(pl.col("margin") == 0).then(0.5).otherwise((pl.col("margin") > 0).cast(pl.Float64))
    ).to_series()
    return mean(right.to_list(), pairs["prompt_id"].to_list(), resamples=resamples)


def judge_consistency(repeats: pl.DataFrame, *, resamples: int = RESAMPLES) -> Estimate:
    """The pair accuracy of a judge's answers against its other answers to the same questions.

    A reward model that learns from single answers of the judge cannot be expected to agree with it more than
    the judge does with itself. Every answer is compared with every other one.

    Args:
        repeats: sample_id, prompt_id, text, repeat, value.
    """
    rounds = [
        one.drop("repeat") for one in repeats.sort("repeat").partition_by("repeat", maintain_order=True)
    ]
    pairs = [
        decided_pairs(one.join(other.select("sample_id", reward="value"), on="sample_id"))
        for one, other in permutations(rounds, 2)
    ]
    return pair_accuracy(pl.concat(pairs), resamples=resamples)


def order_consistency(comparisons: pl.DataFrame, *, resamples: int = RESAMPLES) -> Estimate:
    """How often a pairwise judge prefers the same text in both orders.

    Args:
        comparisons: prompt_id, winner, favoured, status; identical texts, about which the judge was not asked, are left out.
    """
    asked = comparisons.filter(
        (pl.col("status") == "ok") & ((pl.col("winner") != "tie") | pl.col("favoured").is_not_null())
    )
    same = (asked["winner"] != "tie").cast(pl.Float64)
    return mean(same.to_list(), asked["prompt_id"].to_list(), resamples=resamples)


def longer_preferred(pairs: pl.DataFrame, *, resamples: int = RESAMPLES) -> Estimate:
    """How much more often the model prefers the longer text than the feedback does, in [-1, 1]; 0: no bias."""
    known = pairs.drop_nulls("longer")
    model = (
        pl.when(pl.col("margin") == 0)
        .then(0.5)
        .otherwise(((pl.col("margin") > 0) == pl.col("longer")).cast(pl.Float64))
    )
    excess = known.select(model - pl.col("longer").cast(pl.Float64)).to_series()
    return mean(excess.to_list(), known["prompt_id"].to_list(), resamples=resamples)


def calibration_error(pairs: pl.DataFrame) -> float | None:
    """Expected calibration error (Guo et al. 2017) of σ(reward − reward) as the probability of being the better text.

    Each pair counts in both orders, so a model that always gives 1/2 has error 0. None without pairs.
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
    value, reward, prompts = (known[name].to_list() for name in ("value", "reward", "prompt_id"))
    return correlation(value, reward, prompts, "spearman", resamples=resamples)
