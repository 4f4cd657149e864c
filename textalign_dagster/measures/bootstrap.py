"""Means, ratios and paired differences with intervals: prompts are resampled, not samples.

Samples of one prompt resemble each other, so an interval that treats them as independent is too
narrow. Here a *cluster* (a prompt) is drawn with all of its samples (cluster bootstrap, percentile
intervals; Davison and Hinkley, 1997, "Bootstrap Methods and their Application", sections 3.8 and
5.3).

Undefined results are None: no rows, a zero denominator, an interval from fewer than two prompts. They
are never 0 or NaN. Missing values (None, NULL, NaN) are left out together with their row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Column = Sequence[Any] | npt.NDArray[Any]
"""One entry per row: a list, a numpy array or a polars series."""

Per = Literal["sample", "prompt", "prompt_max"]
"""What a mean is taken over: samples, per-prompt means, or per-prompt maxima."""

RESAMPLES = 1000
_ENTRIES_AT_ONCE = 2_000_000  # 16 MB per temporary, whatever the number of prompts
_MAX_UNDEFINED = 0.01  # no interval if a larger share of resamples is undefined


@dataclass(frozen=True)
class Estimate:
    """A number, its interval and how much data it is based on.

    Attributes:
        value: None where undefined.
        lo, hi: percentile interval; None where there is none.
        n: prompts (the unit that is resampled).
        rows: samples that had a value.
    """

    value: float | None
    lo: float | None
    hi: float | None
    n: int
    rows: int


@dataclass(frozen=True)
class Difference(Estimate):
    """``first - second`` on shared prompts, with an interval from paired resamples.

    Attributes:
        only_first, only_second: prompts that only one side has; they are ignored.
    """

    only_first: int
    only_second: int


@dataclass(frozen=True)
class ClusterSums:
    """A metric as a ratio of sums over prompts: ``sum(numerator) / sum(denominator)``.

    Attributes:
        clusters: prompt ids, ascending, shape (prompts,).
        numerator, denominator: shape (prompts,).
        rows: samples behind them, shape (prompts,).
    """

    clusters: npt.NDArray[np.str_]
    numerator: Floats
    denominator: Floats
    rows: Floats


def ratio_sums(numerators: Column, denominators: Column, clusters: Column) -> ClusterSums:
    """Per-prompt sums of two columns, e.g. hits and words, or summed NLL and tokens.

    Raises:
        ValueError: the columns differ in length, or a prompt id is missing.
    """
    a, b, ids = complete_rows(numerators, denominators, clusters)
    names, code = np.unique(ids, return_inverse=True)

    def sums(weights: Floats) -> Floats:
        return np.bincount(code, weights=weights, minlength=names.size).astype(np.float64)

    return ClusterSums(names, sums(a), sums(b), sums(np.ones_like(a)))


def mean_sums(values: Column, clusters: Column, per: Per = "sample") -> ClusterSums:
    """Per-prompt sums whose ratio is a mean over samples, or over per-prompt means or maxima."""
    sums = ratio_sums(values, np.ones(len(values)), clusters)
    if per == "sample":
        return sums
    numerator = sums.numerator / sums.denominator
    if per == "prompt_max":
        known, _, ids = complete_rows(values, values, clusters)
        numerator = np.full(sums.clusters.size, -np.inf)
        np.maximum.at(numerator, np.searchsorted(sums.clusters, ids), known)
    return replace(sums, numerator=numerator, denominator=np.ones_like(sums.denominator))


def estimate(
    sums: ClusterSums,
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
    transform: Callable[[Floats], Floats] | None = None,
) -> Estimate:
    """The ratio of a metric's sums and its percentile interval over resampled prompts.

    Args:
        level: coverage of the interval, in (0, 1).
        transform: a monotone function applied to every ratio (arrays to arrays), e.g. ``np.exp``.
    """

    def statistic(take: npt.NDArray[np.int64]) -> Floats:
        ratio = safe_divide(sums.numerator[take].sum(-1), sums.denominator[take].sum(-1))
        return ratio if transform is None else transform(ratio)

    n = sums.clusters.size
    value, lo, hi = bootstrap_interval(statistic, n, resamples, level, seed)
    return Estimate(value, lo, hi, n, int(sums.rows.sum()))


def difference(first: ClusterSums, second: ClusterSums, *, resamples: int = RESAMPLES) -> Difference:
    """The difference of two policies' or conditions' metrics, paired by prompt.

    Both sides are resampled with the same prompts, so what makes a prompt hard cancels out. An
    interval that excludes 0 is evidence of a difference; overlap of the two separate intervals is
    not evidence against one.
    """
    shared, i, j = np.intersect1d(first.clusters, second.clusters, return_indices=True)

    def statistic(take: npt.NDArray[np.int64]) -> Floats:
        one = safe_divide(first.numerator[i][take].sum(-1), first.denominator[i][take].sum(-1))
        two = safe_divide(second.numerator[j][take].sum(-1), second.denominator[j][take].sum(-1))
        return one - two

    value, lo, hi = bootstrap_interval(statistic, shared.size, resamples)
    rows = int(first.rows[i].sum() + second.rows[j].sum())
    only_first, only_second = first.clusters.size - shared.size, second.clusters.size - shared.size
    return Difference(value, lo, hi, int(shared.size), rows, only_first, only_second)


def mean(
    values: Column,
    clusters: Column,
    per: Per = "sample",
    *,
    resamples: int = RESAMPLES,
    level: float = 0.95,
    seed: int = 0,
) -> Estimate:
    """The mean of a column with its interval; see ``mean_sums`` and ``estimate``."""
    sums = mean_sums(values, clusters, per)
    return estimate(sums, resamples=resamples, level=level, seed=seed)


def bootstrap_interval(
    statistic: Callable[[npt.NDArray[np.int64]], Floats],
    n: int,
    resamples: int,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float | None, float | None, float | None]:
    """(value, lo, hi) of a statistic, a function of prompt indices along the last axis."""
    if not 0 < level < 1:
        raise ValueError(f"level: a coverage between 0 and 1, e.g. 0.95; got {level}")
    if resamples < 1:
        raise ValueError(f"resamples: at least 1; got {resamples}")
    if n == 0:
        return None, None, None
    value = float(statistic(np.arange(n)[None, :])[0])
    if not np.isfinite(value):
        return None, None, None
    if n < 2:
        return value, None, None
    drawn = np.concatenate([statistic(take) for take in _resamples(n, resamples, seed)])
    drawn = drawn[np.isfinite(drawn)]
    if drawn.size < (1 - _MAX_UNDEFINED) * resamples:
        return value, None, None
    lo, hi = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return value, float(lo), float(hi)


def _resamples(n: int, resamples: int, seed: int) -> Iterator[npt.NDArray[np.int64]]:
    """Indices of ``resamples`` draws of n out of n with replacement, in chunks (draws, n)."""
    rng = np.random.default_rng(seed)
    chunk = max(1, _ENTRIES_AT_ONCE // n)
    for start in range(0, resamples, chunk):
        yield rng.integers(0, n, size=(min(chunk, resamples - start), n))


def complete_rows(
    first: Column, second: Column, clusters: Column | None
) -> tuple[Floats, Floats, npt.NDArray[np.str_]]:
    """The rows in which both numbers are known: two float arrays and the prompt ids."""
    a, b = (np.asarray(column, dtype=np.float64) for column in (first, second))
    ids = list(clusters) if clusters is not None else [""] * a.size
    if not a.size == b.size == len(ids):
        raise ValueError(f"columns differ in length: {a.size}, {b.size} and {len(ids)} rows")
    if any(name is None for name in ids):
        raise ValueError("clusters: a prompt id is missing; every sample belongs to a prompt")
    known = ~(np.isnan(a) | np.isnan(b))
    return a[known], b[known], np.array(ids, dtype=np.str_)[known]


def safe_divide(numerator: Floats, denominator: Floats) -> Floats:
    """The ratio, NaN (undefined; internal only) where the denominator is 0."""
    out = np.full(np.shape(numerator), np.nan)
    np.divide(numerator, denominator, out=out, where=denominator != 0)
    return out
