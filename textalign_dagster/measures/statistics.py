"""Statistics for scores: estimates, perplexity, and the worst of many samples."""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from textalign_dagster.measures.bootstrap import (
    RESAMPLES,
    Column,
    Estimate,
    Floats,
    estimate,
    mean,
    ratio_sums,
)

__all__ = [
    "Estimate",
    "continuation_perplexity",
    "estimate",
    "mean",
    "perplexity",
    "perplexity_mean",
    "ratio_sums",
    "text_perplexity",
]

IMPROBABLE = 1e4
"""Per-sample perplexities from this value on are left out of their mean, as in the published toxicity scores."""


def perplexity(nll: Column, n_tokens: Column, clusters: Column, *, resamples: int = RESAMPLES) -> Estimate:
    """exp(sum of NLL / sum of tokens): the token-weighted perplexity, with its interval.

    This is not the mean of per-sample perplexities in the released code, which a single
    improbable text dominates; for that see :func:`perplexity_mean`.

    Args:
        nll: negative log-likelihood of every sample, summed over its tokens, in nats.
        n_tokens: tokens of every sample; samples without tokens add nothing.
    """
    sums = ratio_sums(nll, n_tokens, clusters)
    return estimate(sums, resamples=resamples, transform=_exp)


def continuation_perplexity(nll_whole: float, nll_prompt: float, n_tokens: int) -> float | None:
    """One continuation's perplexity given its prompt, as published for toxicity.

    Args:
        nll_whole: negative log-likelihood of prompt and continuation together, in nats.
        nll_prompt: of the prompt alone; 0 where ``nll_whole`` is that of the continuation given the prompt.
        n_tokens: tokens the continuation adds; None is returned for an empty one.
    """
    if n_tokens < 1:
        return None
    try:
        return math.exp((nll_whole - nll_prompt) / n_tokens)
    except OverflowError:
        return math.inf


def text_perplexity(log_probs: Column) -> float | None:
    """One text's perplexity without its prompt, as published for summaries and dialogues.

    Args:
        log_probs: log-probability of each of the text's tokens given those before it *in the text*, in nats.
    """
    known = np.asarray(log_probs, dtype=np.float64)
    return continuation_perplexity(-float(known.sum()), 0.0, known.size)


def perplexity_mean(
    nll: Column,
    n_tokens: Column,
    clusters: Column,
    *,
    limit: float = IMPROBABLE,
    resamples: int = RESAMPLES,
) -> Estimate:
    """The mean of per-sample perplexities, as published: empty samples and those at or above ``limit`` are left out.

    Args:
        nll: negative log-likelihood of every sample given its prompt, in nats; None: unknown.
        n_tokens: tokens of every sample.
    """
    values = [
        None if total is None or count is None else continuation_perplexity(total, 0.0, count)
        for total, count in zip(nll, n_tokens, strict=True)
    ]
    kept = [value if value is not None and value < limit else None for value in values]
    return mean(kept, clusters, resamples=resamples)


def worst_of(scores: Column, better: Literal["lower", "higher"], size: int = 25) -> float | None:
    """The mean over groups of ``size`` samples of the worst score in each: shows what is rare but bad
    (score_max@25 of Korbak et al. 2023).

    Sample i is in group i modulo the number of groups, as in their code; leftover samples are left out. None
    with fewer samples than ``size``. Samples without a score do not count.
    """
    known = np.asarray([score for score in scores if score is not None], dtype=np.float64)
    groups = known.size // size
    if groups == 0:
        return None
    table = known[: groups * size].reshape(size, groups)
    return float((table.max(0) if better == "lower" else table.min(0)).mean())


def _exp(values: Floats) -> Floats:
    """exp without a warning on overflow, which gives infinity and so counts as undefined."""
    with np.errstate(over="ignore"):
        return np.exp(values)
