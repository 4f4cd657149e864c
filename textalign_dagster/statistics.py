"""What scores are made of: estimates, correlations, diversity and perplexity, from one place."""

from __future__ import annotations

import numpy as np

from textalign_dagster.bootstrap import (
    RESAMPLES,
    ClusterSums,
    Column,
    Difference,
    Estimate,
    Floats,
    difference,
    estimate,
    mean,
    mean_sums,
    ratio_sums,
)
from textalign_dagster.correlation import correlation, pearson, spearman
from textalign_dagster.diversity import distinct_n, distinct_n_blocks, distinct_n_per_prompt

__all__ = [
    "ClusterSums",
    "Difference",
    "Estimate",
    "correlation",
    "difference",
    "distinct_n",
    "distinct_n_blocks",
    "distinct_n_per_prompt",
    "estimate",
    "mean",
    "mean_sums",
    "pearson",
    "perplexity",
    "ratio_sums",
    "spearman",
]


def perplexity(
    nll: Column,
    n_tokens: Column,
    clusters: Column,
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """exp(sum of NLL / sum of tokens): the token-weighted perplexity, with its interval.

    This is not the mean of per-sample perplexities of the released code, which a single
    improbable text dominates.

    Args:
        nll: negative log-likelihood of every sample, summed over its tokens, in nats.
        n_tokens: tokens of every sample; samples without tokens add nothing.
    """
    sums = ratio_sums(nll, n_tokens, clusters)
    return estimate(sums, resamples=resamples, level=level, seed=seed, transform=_exp)


def _exp(values: Floats) -> Floats:
    """exp; an overflow is infinite, hence undefined, without a warning."""
    with np.errstate(over="ignore"):
        return np.exp(values)
