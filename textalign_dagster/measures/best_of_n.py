"""Best-of-n: the sample with the best score among n of a prompt, for every n from one set of N samples.

With F(s) the share of a prompt's samples that score at most s, and F(s−) the share below, best-of-n has the
score s with probability F(s)^n − F(s−)^n. Among equal scores it takes the first sample drawn, so given
the score it is distributed like the policy, and its divergence from the policy is that of the two score distributions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import polars as pl

from textalign_dagster.measures.bootstrap import Floats


def chosen(candidates: pl.DataFrame, n: int) -> pl.DataFrame:
    """The best of each n successive candidates of a prompt: N // n rows per prompt, independent of each other.

    Args:
        candidates: prompt_id, score (higher is better; NULL is worse than any), in the order they were
            drawn; other columns are kept.
    """
    numbered = candidates.with_columns(
        at=pl.int_range(pl.len()).over("prompt_id"), of=pl.len().over("prompt_id")
    )
    whole = numbered.filter(pl.col("at") < pl.col("of") // n * n).with_columns(group=pl.col("at") // n)
    best = pl.col("score").fill_null(-math.inf)
    first = pl.col("at").filter(best == best.max()).min().over("prompt_id", "group")
    return whole.filter(pl.col("at") == first).drop("at", "of", "group")


def expected_best(scores: list[float], n: int) -> float:
    """The expected best score among n of the N given ones: its mean over all subsets of size n, in closed form.

    Σ_i C(i − 1, n − 1)/C(N, n)·s_(i) over the scores in ascending order (the unbiased estimator of Chen et al. 2021's
    pass@k, for any score).

    Raises:
        ValueError: there are fewer than n scores.
    """
    if len(scores) < n:
        raise ValueError(f"{len(scores)} scores for the best of {n}")
    subsets = math.comb(len(scores), n)
    return sum(math.comb(i, n - 1) / subsets * score for i, score in enumerate(sorted(scores)))


def kl_bound(n: int) -> float:
    """log n − (n − 1)/n, in nats: the divergence of best-of-n where no two scores are equal, else a bound
    (Beirami et al. 2024, "Theoretical guarantees on the best-of-n alignment policy")."""
    return math.log(n) - (n - 1) / n


def kl(scores: list[float], n: int) -> float:
    """KL(best-of-n || policy) of one prompt, in nats, with the empirical distribution of its N scores as F.

    Σ_s p_n(s)·log(p_n(s)/p(s)),  p_n(s) = F(s)^n − F(s−)^n,  p(s) = F(s) − F(s−)

    It is at most log N, and biased low as n approaches N: draw several times the largest n.
    """
    p, p_n, _ = _distributions(scores, n)
    return float(np.sum(p_n * np.log(p_n / p)))


def win_rate(scores: list[float], n: int) -> float:
    """How often best-of-n scores higher than one sample of the policy, equal scores counting 1/2, for one prompt.

    Σ_s p_n(s)·(F(s−) + p(s)/2); 1/2 for n = 1.
    """
    p, p_n, below = _distributions(scores, n)
    return float(np.sum(p_n * (below + p / 2)))


def _distributions(scores: list[float], n: int) -> tuple[Floats, Floats, Floats]:
    """p(s), p_n(s) and F(s−) of every distinct score, ascending."""
    _, counts = np.unique(np.asarray(scores, np.float64), return_counts=True)
    upto = np.cumsum(counts) / counts.sum()
    below = np.concatenate([[0.0], upto[:-1]])
    return upto - below, upto**n - below**n, below


ESTIMATES: Mapping[str, Callable[[list[float], int], float]] = {
    "ranked_score": expected_best,
    "win_rate_over_one": win_rate,
    "kl": kl,
}
"""Metric → its value for one prompt, given all its scores and n."""

TITLES = {
    "ranked_score": "expected best score of the ranker",
    "win_rate_over_one": "win rate over one sample",
    "kl": "KL from one sample (nats)",
    "kl_bound": "log n - (n - 1)/n",
}
