"""The datapool: a pure function of all feedback so far and a few settings.

Earlier samples are dropped, rewards become labels, and a length-aware, balanced draw decides what
is trained on. Every input row is in the output, with whether it was drawn and why. Nothing is
mutated and nothing depends on the order of the rows: same rows, settings and seed give the same
pool, bit for bit.

The defaults follow the released code of ALT (Abadal Lloret et al., 2024). Its state between iterations is
replaced by recomputing which past samples would still be in the pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from textalign_dagster.ids import derive_seed
from textalign_dagster.pool.draw import (
    CODE,
    DRAWN_REASONS,
    REASONS,
    count_shortfalls,
    draw_reasons,
    dropped_rows,
)
from textalign_dagster.pool.quantiles import (
    NO_LABEL,
    QuantileSettings,
    check_labels,
    label_series,
    quantile_codes,
    reward_array,
)
from textalign_dagster.pool.row_order import Ints, Mask, canonical_order, group_codes, shuffle_keys
from textalign_dagster.settings.pool import PoolSettings
from textalign_dagster.tables import DATAPOOL, STATUSES, conform


@dataclass(frozen=True)
class Pool:
    """A pool, its shortfalls, and how many samples were requested.

    Attributes:
        rows: one row per input row, schema ``DATAPOOL``, in canonical order.
        shortfalls: one row per label, schema ``SHORTFALLS``.
        groups: number of prompts (or 1) drawn from.
        wanted: samples requested over all groups; None where nothing limits the draw.
        drawn: number of samples to train on.
    """

    rows: pl.DataFrame
    shortfalls: pl.DataFrame
    groups: int
    wanted: int | None
    drawn: int


def build_pool(
    rows: pl.DataFrame,
    settings: PoolSettings,
    *,
    current: int,
    labels: Sequence[str],
    seed: int,
    pool_hash: str,
    sampling_limit: int | None = None,
    quantiles: QuantileSettings | None = None,
    conditions: Mapping[str, str] | None = None,
) -> Pool:
    """The pool of iteration ``current``.

    Args:
        rows: one row per sample: sample_id (a content hash), prompt_id, origin (the iteration that
            sampled it), value, label, condition, n_tokens (NULL counts as not over-long), status;
            optionally weight (default 1) and position (integer: the position within its iteration,
            which refines insertion order).
        labels: the labels to balance over, best first. May be empty where nothing limits the draw.
        seed: of the experiment; ``current`` is mixed in, so iterations draw differently.
        pool_hash: the name of this pool, computed by the caller from settings and inputs.
        sampling_limit: ``max_new_tokens`` of the decoding, used when ``max_tokens`` is unset.
        quantiles: compute labels from ``value`` after dropping (and ignore the rows' own labels).
            As published, quantiles are ranks among the samples now in the pool.
        conditions: the conditioning text of every label; None keeps the rows' column ``condition``.

    Raises:
        ValueError: a column is missing or holds invalid values; names it and the remedy.
    """
    if labels or quantiles is not None:
        check_labels(labels)
    needed = {"label": quantiles is None, "condition": conditions is None}
    _check_rows(rows, current, [column for column, is_needed in needed.items() if is_needed])
    unworded = sorted(set(labels) - set(conditions)) if conditions is not None else []
    if unworded:
        raise ValueError(f"conditions: no conditioning text for the labels {unworded}")
    order, bits = canonical_order(rows)
    rows = rows[order]
    origin = rows["origin"].to_numpy().astype(np.int64)
    group = _groups(rows, settings.per)
    usable = (rows["status"] == "ok").to_numpy()
    label_codes = _labeller(rows, labels, quantiles, usable)
    dropped = dropped_rows(
        origin,
        group,
        bits,
        usable,
        settings.drop_factor,
        current=current,
        seed=seed,
        label_codes=label_codes if settings.drop_by == "group_and_label" else None,
    )
    alive = usable & ~dropped
    code = label_codes(alive)
    present = np.flatnonzero(np.bincount(group[alive | (origin == current)]))

    if quantiles is None:
        label = rows.select(pl.when(pl.col("status") == "ok").then("label").alias("label"))["label"]
        unused_label = label.is_not_null().to_numpy() & (code == NO_LABEL)
    else:
        label = label_series(code, labels)
        unused_label = np.zeros_like(usable)
    reason = _reasons_before_draw(rows, dropped, unused_label)
    index = np.flatnonzero(alive & (code != NO_LABEL) if labels else alive)
    quota, wanted = None, None
    if settings.draws_all:
        reason[index] = CODE["everything"]
    else:
        quota = np.array(settings.quotas(labels), dtype=np.int64)
        wanted = (settings.samples or int(quota.sum())) * present.size
        over_long = (rows["n_tokens"].cast(pl.Int64) >= settings.length_limit(sampling_limit)).fill_null(
            False
        )
        keys = shuffle_keys(bits[index], derive_seed(seed, "draw", current))
        reason[index] = draw_reasons(
            group[index], code[index], over_long.to_numpy()[index], keys, quota, settings
        )

    drawn = reason < len(DRAWN_REASONS)
    frame = rows.with_columns(
        label.alias("label"),
        (rows["condition"] if conditions is None else _conditions(label, conditions)).alias("condition"),
        pl.Series("drawn", drawn),
        pl.Series(list(REASONS), dtype=pl.String).gather(reason).alias("reason"),
        pl.lit(pool_hash).alias("pool_hash"),
        (pl.col("weight") if "weight" in rows.columns else pl.lit(1.0)).alias("weight"),
    )
    return Pool(
        rows=conform(frame.select(list(DATAPOOL)), DATAPOOL, "datapool"),
        shortfalls=count_shortfalls(labels, group, code, reason, present, quota),
        groups=present.size,
        wanted=wanted,
        drawn=int(drawn.sum()),
    )


def drop_earlier(
    rows: pl.DataFrame,
    factor: float,
    seed: int,
    by: Literal["group", "group_and_label"] = "group",
    *,
    current: int,
    per: Literal["prompt", "pool"] = "prompt",
) -> pl.Series:
    """Whether each row is no longer in the pool at iteration ``current``; see ``dropped_rows``.

    Args:
        rows: sample_id, prompt_id, origin; label with ``by="group_and_label"``.

    Returns:
        Booleans named "dropped", in the order of ``rows``. ``build_pool`` does the same with the rows
        whose feedback is usable.
    """
    order, bits = canonical_order(rows)
    ordered = rows[order]
    label_codes = None
    if by == "group_and_label":
        codes = group_codes(ordered["label"].fill_null(""))
        label_codes = lambda _: codes  # noqa: E731
    dropped = np.empty(rows.height, dtype=bool)
    dropped[order] = dropped_rows(
        ordered["origin"].to_numpy().astype(np.int64),
        _groups(ordered, per),
        bits,
        np.ones(rows.height, dtype=bool),
        factor,
        current=current,
        seed=seed,
        label_codes=label_codes,
    )
    return pl.Series("dropped", dropped)


def _groups(rows: pl.DataFrame, per: str) -> Ints:
    """The group that draws are balanced within: one code per prompt, or one for all; shape (rows,)."""
    return group_codes(rows["prompt_id"]) if per == "prompt" else np.zeros(rows.height, np.int64)


def _labeller(
    rows: pl.DataFrame, labels: Sequence[str], quantiles: QuantileSettings | None, usable: Mask
) -> Callable[[Mask], Ints]:
    """A function from a mask of the rows in the pool to label codes, shape (rows,) each."""
    if quantiles is None:
        names = pl.Series(list(labels), dtype=pl.String)
        given = (
            rows["label"]
            .cast(pl.String)
            .replace_strict(names, np.arange(len(labels)), default=NO_LABEL, return_dtype=pl.Int64)
        )
        fixed = np.where(usable, given.to_numpy(), NO_LABEL)
        return lambda _: fixed
    rule, value, ranked_in = quantiles, reward_array(rows), _groups(rows, quantiles.per)
    return lambda alive: quantile_codes(ranked_in, np.where(alive, value, np.nan), len(labels), rule)


def _reasons_before_draw(rows: pl.DataFrame, dropped: Mask, unused_label: Mask) -> Ints:
    """Why a row is not even a candidate (codes into ``REASONS``), shape (rows,).

    A judgement that is not ok takes precedence: such a row was never in any pool.
    """
    reason = np.full(rows.height, CODE["no label"], dtype=np.int64)
    reason[unused_label] = CODE["label not in use"]
    reason[dropped] = CODE["dropped: earlier iteration"]
    for status in STATUSES[1:]:
        reason[(rows["status"] == status).to_numpy()] = CODE[f"feedback {status}"]
    return reason


def _check_rows(rows: pl.DataFrame, current: int, extra: Sequence[str]) -> None:
    """Raise ValueError naming the first column of ``rows`` that a pool cannot be built from."""
    needed = ("sample_id", "prompt_id", "origin", "value", "n_tokens", "status", *extra)
    missing = [c for c in needed if c not in rows.columns]
    if missing:
        raise ValueError(f"rows of the pool lack the columns {missing}")
    for column in ("prompt_id", "origin", "status", "weight", "position"):
        if column in rows.columns and rows[column].has_nulls():
            raise ValueError(f"column {column}: NULL in {rows[column].null_count()} rows of the pool")
    unknown = set(rows["status"].unique()) - set(STATUSES)
    if unknown:
        raise ValueError(f"column status: {sorted(unknown)} are not among {list(STATUSES)}")
    later = rows.filter(pl.col("origin") > current).height
    if later:
        raise ValueError(
            f"column origin: {later} rows are from iterations after {current}; "
            "leave them out, a pool must not see the future"
        )


def _conditions(label: pl.Series, mapping: Mapping[str, str]) -> pl.Series:
    """The conditioning text of every row's label, NULL where the label has none or is missing."""
    return label.replace_strict(
        pl.Series(list(mapping), dtype=pl.String),
        pl.Series(list(mapping.values()), dtype=pl.String),
        default=None,
        return_dtype=pl.String,
    )
