"""Agreement between two readings of the same pairs: a 3×3 table, shares, and Cohen's kappa.

Classes are "a", "tie", "b". Intervals resample prompts with all of their pairs (cluster bootstrap).
Undefined values are None.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import polars as pl

from textalign_dagster.measures.bootstrap import RESAMPLES, Estimate, bootstrap_interval, safe_divide

CLASSES = ("a", "tie", "b")

Counts = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """Two readings of the same pairs; every pair counts once, however many pairs its prompt has.

    Attributes:
        matrix: counts, shape (3, 3); rows are the first reading's classes, columns the second's, in
            the order of :data:`CLASSES`.
        agreement: share of pairs in the same class; a tie is a class like the others (as in
            sparse_feedback), so chance agreement is not 1/2.
        decisive: the same over pairs in which neither reading is a tie.
        kappa: Cohen's (1960) chance-corrected agreement, (p_o - p_e) / (1 - p_e).
    """

    matrix: tuple[tuple[int, ...], ...]
    agreement: Estimate
    decisive: Estimate
    kappa: Estimate


def agreement(readings: pl.DataFrame, *, resamples: int = RESAMPLES) -> Agreement:
    """The agreement between two columns of readings.

    Args:
        readings: prompt_id, first, second (each one of :data:`CLASSES`); one row per pair.

    Raises:
        ValueError: a column holds any other value.
    """
    codes = []
    for column in ("first", "second"):
        values = readings[column].to_list()
        unknown = sorted({str(value) for value in values if value not in CLASSES})
        if unknown:
            raise ValueError(f"column {column}: {unknown[0]!r} is not one of {', '.join(CLASSES)}")
        codes.append(np.array([CLASSES.index(value) for value in values], dtype=np.int64))
    names, cluster = np.unique(readings["prompt_id"].to_numpy(), return_inverse=True)
    cells = cluster * 9 + codes[0] * 3 + codes[1]
    counts = np.bincount(cells, minlength=names.size * 9).reshape(-1, 3, 3).astype(np.float64)

    def estimate(statistic: Callable[[Counts], Counts], rows: int) -> Estimate:
        value, lo, hi = bootstrap_interval(
            lambda take: statistic(counts[take].sum(axis=-3)), names.size, resamples
        )
        return Estimate(value, lo, hi, int(names.size), rows)

    table = counts.sum(axis=0).astype(int)
    return Agreement(
        matrix=tuple(map(tuple, table.tolist())),
        agreement=estimate(_same, readings.height),
        decisive=estimate(lambda c: _same(c[..., ::2, ::2]), int(table[::2, ::2].sum())),  # without ties
        kappa=estimate(_kappa, readings.height),
    )


def _same(counts: Counts) -> Counts:
    """Share on the diagonal, for counts of shape (…, k, k)."""
    diagonal = np.trace(counts, axis1=-2, axis2=-1)
    return safe_divide(np.asarray(diagonal), counts.sum(axis=(-2, -1)))


def _kappa(counts: Counts) -> Counts:
    total = counts.sum(axis=(-2, -1))
    by_chance = (counts.sum(axis=-1) * counts.sum(axis=-2)).sum(axis=-1)
    expected = safe_divide(by_chance, total * total)
    above, room = _same(counts) - expected, 1.0 - expected
    # With a single class, chance agreement is certain and kappa is undefined.
    return safe_divide(above, np.where(room > 1e-12, room, 0.0))
