"""The two selections behind the datapool, on plain arrays: what is dropped and what is drawn.

Every function is vectorised over all groups at once: a row's fate depends on its rank within a
group, and a shuffle is a rank by a seeded key. The cost is a few sorts of the pool for any number of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import polars as pl

from textalign_dagster.ids import derive_seed
from textalign_dagster.pool.row_order import Bits, Ints, Mask, ranks_within, shuffle_keys
from textalign_dagster.settings.pool import PoolSettings

DRAWN_REASONS = ("quota", "top-up", "fill", "everything")
"""Why a row is trained on: within its label's quota; over-long, but its label ran out of shorter
ones; to make up for labels that fell short; because the settings set no limit."""

NOT_DRAWN_REASONS = (
    "bucket full",
    "over-long",
    "no label",
    "label not in use",
    "dropped: earlier iteration",
    "feedback failed",
    "feedback unparseable",
    "feedback skipped",
)
"""Why a row is not trained on. "over-long" rows were passed over because there were enough others."""

REASONS = DRAWN_REASONS + NOT_DRAWN_REASONS
CODE = {reason: code for code, reason in enumerate(REASONS)}

SHORTFALLS = pl.Schema(
    {
        "label": pl.String,  # in the order of the labels, best first
        "groups": pl.Int64,  # prompts (or 1 for the whole pool) drawn from
        "wanted": pl.Int64,  # quota times groups; NULL where nothing limits the draw
        "obtained": pl.Int64,  # drawn within the quota, over-long ones included
        "short": pl.Int64,  # wanted - obtained, 0 where nothing limits the draw
        "groups_short": pl.Int64,  # groups in which the quota was not met
        "over_long": pl.Int64,  # of obtained: over-long samples that topped up
        "filled": pl.Int64,  # drawn beyond the quota to make up for other labels
    }
)


def dropped_rows(
    origin: Ints,
    group: Ints,
    bits: Bits,
    usable: Mask,
    factor: float,
    *,
    current: int,
    seed: int,
    label_codes: Callable[[Mask], Ints] | None = None,
) -> Mask:
    """Which usable rows are no longer in the pool at iteration ``current``, shape (rows,).

    The published pool is flushed once an iteration, before new samples enter, so a sample from j
    iterations ago has survived j flushes. The flushes are replayed here: at each one,
    ``int(n * (1 - factor))`` random rows of every group stay (in floating point, as published: of
    10 rows, a factor of 0.9 keeps none).

    Args:
        origin: iteration of every row, none after ``current``, shape (rows,).
        group: codes from 0, shape (rows,).
        bits: ``row_order.sample_bits``, shape (rows,).
        usable: rows that ever enter the pool, shape (rows,).
        factor: share to drop at every flush, 0 to 1.
        seed: every flush has its own seed, derived from this one and the iteration; with the
            same seed a row dropped at one iteration stays dropped at later ones.
        label_codes: maps the rows in the pool to label codes; n then counts per group and label.
    """
    if factor == 0 or not usable.any():
        return np.zeros_like(usable)
    if factor == 1:
        return usable & (origin < current)
    first = int(origin[usable].min())
    kept = usable & (origin == first)
    for iteration in range(first + 1, current + 1):
        index = np.flatnonzero(kept)
        if index.size:
            bucket = group[index]
            if label_codes is not None:
                code = label_codes(kept)
                bucket = bucket * (int(code.max()) + 2) + code[index] + 1
            keys = shuffle_keys(bits[index], derive_seed(seed, "drop", iteration))
            rank = ranks_within(bucket, keys)
            stay = (np.bincount(bucket)[bucket] * (1 - factor)).astype(np.int64)
            kept[index[rank >= stay]] = False
        kept |= usable & (origin == iteration)
    dropped: Mask = usable & ~kept
    return dropped


def draw_reasons(
    group: Ints, code: Ints, over_long: Mask, keys: Bits, quota: Ints, settings: PoolSettings
) -> Ints:
    """The fate of every candidate as a code into ``REASONS``, shape (rows,).

    Per group and label: shuffle, take rows that are not over-long up to the quota, top up with
    over-long ones. With ``settings.samples``, each group is then filled up to that number.

    Args:
        group, code: codes from 0 of group and label, shape (rows,); rows are in insertion order.
        over_long: rows that reached the length limit, shape (rows,).
        keys: the seeded shuffle, shape (rows,).
        quota: samples per group of every label, shape (labels,).
    """
    bucket = group * quota.size + code
    drawn = ranks_within(bucket, over_long, keys) < quota[code]
    reason = np.where(over_long, CODE["over-long"], CODE["bucket full"])
    reason[drawn] = np.where(over_long[drawn], CODE["top-up"], CODE["quota"])
    if settings.samples is not None and settings.fill != "none" and group.size:
        missing = settings.samples - np.bincount(group, weights=drawn).astype(np.int64)
        unused = np.flatnonzero(~drawn)
        order = (keys[unused],) if settings.fill == "shuffled" else ()
        rank = ranks_within(group[unused], *order)
        reason[unused[rank < missing[group[unused]]]] = CODE["fill"]
    return reason


def count_shortfalls(
    labels: Sequence[str],
    group: Ints,
    code: Ints,
    reason: Ints,
    present: Ints,
    quota: Ints | None,
) -> pl.DataFrame:
    """Wanted and obtained per label, schema ``SHORTFALLS``.

    Args:
        group, code, reason: of every row, shape (rows,).
        present: groups drawn from; those without any candidate count as short.
        quota: samples per group of every label, shape (labels,); None: nothing limits the draw.
    """
    lines = []
    groups = int(group.max(initial=-1)) + 1
    for number, label in enumerate(labels):
        mine = code == number
        within = mine & (reason <= CODE["top-up"])
        if quota is None:
            obtained = int((mine & (reason == CODE["everything"])).sum())
            wanted, groups_short = None, 0
        else:
            per_group = np.bincount(group[within], minlength=groups)[present]
            obtained, wanted = int(per_group.sum()), int(quota[number]) * present.size
            groups_short = int((per_group < quota[number]).sum())
        lines.append(
            {
                "label": label,
                "groups": present.size,
                "wanted": wanted,
                "obtained": obtained,
                "short": 0 if wanted is None else wanted - obtained,
                "groups_short": groups_short,
                "over_long": int((mine & (reason == CODE["top-up"])).sum()),
                "filled": int((mine & (reason == CODE["fill"])).sum()),
            }
        )
    return pl.DataFrame(lines, schema=SHORTFALLS)
