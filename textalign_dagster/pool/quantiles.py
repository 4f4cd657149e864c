"""Quantile labels: rewards become one of K labels within a prompt or the whole pool.

The published rule (ALT, Quark) is the default: rows without a reward are left out, the others are
sorted by reward in descending order (stable), every quantile takes ``floor(n / K)`` of them and the
last, worst one takes the remainder as well. So 96 samples and 5 labels give 19, 19, 19, 19, 20;
14 give 2, 2, 2, 2, 6; 3 are all worst. The other rules are opt-in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import polars as pl
from pydantic import Field

from textalign_dagster.pool.row_order import Ints, canonical_order, group_codes, ranks_within
from textalign_dagster.settings import Settings

NO_LABEL = -1
"""Code of a row without a label."""


class QuantileSettings(Settings):
    """How rewards become quantile labels. The defaults are the published per-prompt rule."""

    per: Literal["prompt", "pool"] = Field(
        default="prompt",
        description="Rank samples against those of the same prompt (ALT on summarization), or of "
        "the whole pool (Quark on toxicity).",
    )
    ties: Literal["split", "share"] = Field(
        default="split",
        description="Equal rewards at a boundary: 'split' (published) cuts between them by the order "
        "of the samples; 'share' gives all of them the best quantile that any of them falls into.",
    )
    remainder: Literal["last", "spread"] = Field(
        default="last",
        description="When n is not a multiple of K: 'last' (published) puts the remainder into the "
        "worst quantile; 'spread' makes sizes differ by at most one.",
    )
    few: Literal["worst", "spread", "none"] = Field(
        default="worst",
        description="A prompt with fewer samples than quantiles: 'worst' (published) labels all of "
        "them worst; 'spread' places them evenly from best to worst; 'none' leaves them without a "
        "label.",
    )


def quantile_codes(group: Ints, value: npt.NDArray[np.float64], k: int, settings: QuantileSettings) -> Ints:
    """Quantile of every row, 0 (best) to ``k - 1`` (worst), or ``NO_LABEL``; shape (rows,).

    Args:
        group: codes from 0 of the groups that rows are ranked within, shape (rows,); ``settings.per``
            is ignored here.
        value: rewards, higher is better, NaN where there is none, shape (rows,). Ties are split in
            the order of the rows.
        k: number of quantiles, at least 1.
    """
    codes = np.full(group.size, NO_LABEL, dtype=np.int64)
    ranked = np.flatnonzero(~np.isnan(value))
    if ranked.size == 0:
        return codes
    g, v = group[ranked], value[ranked]
    rank = ranks_within(g, -v)
    n = np.bincount(g)[g]
    worst = k - 1
    last = np.minimum(rank // np.maximum(n // k, 1), worst)
    # The sample's midpoint on the scale from best to worst: sizes differ by at most one.
    spread = (2 * rank + 1) * k // (2 * n)
    code = last if settings.remainder == "last" else spread
    if settings.few == "spread":
        code = np.where(n < k, spread, code)
    else:
        code = np.where(n < k, worst if settings.few == "worst" else NO_LABEL, code)
    if settings.ties == "share":
        code = _best_of_equals(g, v, rank, code)
    codes[ranked] = code
    return codes


def _best_of_equals(group: Ints, value: npt.NDArray[np.float64], rank: Ints, code: Ints) -> Ints:
    """Every row gets the code of the first row with its group and value."""
    order = np.lexsort((rank, group))
    g, v = group[order], value[order]
    first = np.ones(order.size, dtype=bool)
    first[1:] = (g[1:] != g[:-1]) | (v[1:] != v[:-1])
    leader = np.maximum.accumulate(np.where(first, np.arange(order.size), 0))
    shared = np.empty_like(code)
    shared[order] = code[order][leader]
    return shared


def quantile_labels(
    rows: pl.DataFrame, labels: Sequence[str], settings: QuantileSettings | None = None
) -> pl.Series:
    """The quantile label of every row, as a string series in the order of ``rows``.

    Args:
        rows: sample_id (a content hash), prompt_id, value (NULL: no reward, so no label) and,
            where known, origin and position, which define the order that ties are split by.
        labels: K labels, best first.
        settings: None: the published per-prompt rule.

    Raises:
        ValueError: no labels, a repeated label, a NaN reward, an id that is not a hash or is repeated.
    """
    settings = settings or QuantileSettings()
    check_labels(labels)
    value = reward_array(rows)
    order, _ = canonical_order(rows)
    group = group_codes(rows["prompt_id"]) if settings.per == "prompt" else np.zeros_like(order)
    codes = np.empty(rows.height, dtype=np.int64)
    codes[order] = quantile_codes(group[order], value[order], len(labels), settings)
    return label_series(codes, labels)


def check_labels(labels: Sequence[str]) -> None:
    """Raise ValueError unless there is a label and all differ."""
    if isinstance(labels, str) or not labels or len(set(labels)) != len(labels):
        raise ValueError(f"labels: expected one or more different labels, best first; got {labels!r}")


def reward_array(rows: pl.DataFrame) -> npt.NDArray[np.float64]:
    """Column ``value`` with NaN for NULL, shape (rows,); ValueError if it contains NaN."""
    value = rows["value"].cast(pl.Float64)
    if value.is_nan().any():
        raise ValueError("column value: holds NaN; a reward that could not be computed must be NULL")
    return value.fill_null(float("nan")).to_numpy()


def label_series(codes: Ints, labels: Sequence[str]) -> pl.Series:
    """Codes as their labels, NULL for ``NO_LABEL``; shape (rows,)."""
    index = pl.Series(codes).replace(NO_LABEL, None)
    return pl.Series("label", list(labels), dtype=pl.String).gather(index)
