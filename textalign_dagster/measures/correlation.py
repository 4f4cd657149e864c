"""Correlations without scipy, alone and with an interval over resampled prompts."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from textalign_dagster.measures.bootstrap import (
    RESAMPLES,
    Column,
    Estimate,
    Floats,
    bootstrap_interval,
    complete_rows,
    safe_divide,
)


def pearson(x: Column, y: Column) -> float | None:
    """Pearson's correlation, or None with fewer than two pairs or if one side does not vary."""
    a, b, _ = complete_rows(x, y, None)
    if a.size < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    a, b = _centred(a), _centred(b)
    r = a @ b / np.sqrt((a @ a) * (b @ b))
    return float(np.clip(r, -1.0, 1.0)) if np.isfinite(r) else None


def spearman(x: Column, y: Column) -> float | None:
    """Spearman's rank correlation (ties get their average rank), None where ``pearson`` is."""
    a, b, _ = complete_rows(x, y, None)
    return pearson(average_ranks(a), average_ranks(b))


def correlation(
    x: Column,
    y: Column,
    clusters: Column,
    kind: Literal["pearson", "spearman"] = "spearman",
    *,
    resamples: int = RESAMPLES,
) -> Estimate:
    """A correlation over samples with an interval over resampled prompts.

    Spearman's ranks are those of all samples: they are not recomputed within a resample, which
    changes the interval little and reduces it to sums.
    """
    a, b, ids = complete_rows(x, y, clusters)
    names, code = np.unique(ids, return_inverse=True)
    value = (pearson if kind == "pearson" else spearman)(a, b)
    if value is None:
        return Estimate(None, None, None, names.size, a.size)
    if kind == "spearman":
        a, b = average_ranks(a), average_ranks(b)
    a, b = _centred(a), _centred(b)
    terms = (np.ones_like(a), a, b, a * a, b * b, a * b)
    sums = np.stack([np.bincount(code, weights=w, minlength=names.size) for w in terms])

    def statistic(take: npt.NDArray[np.int64]) -> Floats:
        n, sx, sy, sxx, syy, sxy = (s[take].sum(-1) for s in sums)
        vx, vy = n * sxx - sx * sx, n * syy - sy * sy
        # Rounding leaves a trace of variance where a resample has none.
        vx, vy = (np.where(v > 1e-12 * n * n, v, 0.0) for v in (vx, vy))
        return np.clip(safe_divide(n * sxy - sx * sy, np.sqrt(vx * vy)), -1.0, 1.0)

    _, lo, hi = bootstrap_interval(statistic, names.size, resamples)
    return Estimate(value, lo, hi, names.size, a.size)


def average_ranks(values: Floats) -> Floats:
    """Ranks from 1, equal values sharing their average; shape (rows,)."""
    _, code, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Floats = (np.cumsum(counts) - (counts - 1) / 2)[code]
    return ranks


def _centred(values: Floats) -> Floats:
    """Deviations from the mean in units of their root mean square, shape (rows,)."""
    deviation = values - values.mean()
    scaled = deviation / np.abs(deviation).max()
    result: Floats = scaled / np.sqrt(np.mean(scaled**2))
    return result
