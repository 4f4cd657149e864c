"""Comparisons of two responses, always asked in both orders.

A judge that prefers the same response both times has a winner. One that prefers the same *place*
both times has not: that is a tie, counted as position bias. So swapping the two responses can only
swap the verdict.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import polars as pl

from textalign_dagster.judging.verdict import Status, Verdict
from textalign_dagster.tables import FEEDBACK, conform

Winner = Literal["a", "b", "tie"]
Place = Literal["first", "second"]

PAIRS = pl.Schema(
    {  # type: ignore[arg-type]  # mypy joins type classes and instances to object
        "prompt_id": pl.String,
        "sample_a": pl.String,  # key, with sample_b and aspect; sample_a < sample_b
        "sample_b": pl.String,
        "aspect": pl.String,
        "winner": pl.String,  # a | b | tie; NULL: not ok
        "favoured": pl.String,  # of a tie: the place ("first", "second") that won both times
        "status": pl.String,
        "reason": pl.String,
        "scorer": pl.String,
        "scorer_version": pl.String,
        "parser_version": pl.String,
        "call_keys": pl.List(pl.String),  # A shown first, then B shown first
    }
)
"""One row a compared pair of samples of one prompt."""

_WORST_FIRST: tuple[Status, ...] = ("failed", "unparseable", "skipped")
_POINTS = {"a": (1.0, 0.0), "b": (0.0, 1.0), "tie": (0.5, 0.5)}
_NAMES = {1.0: "win", 0.5: "tie", 0.0: "loss"}


@dataclass(frozen=True)
class PairVerdict:
    """What two calls say of a pair.

    Attributes:
        winner: None unless ok.
        favoured: of a tie, the place that won both times.
    """

    status: Status
    winner: Winner | None = None
    favoured: Place | None = None
    reason: str | None = None


def pair_verdict(reply_ab: Verdict, reply_ba: Verdict) -> PairVerdict:
    """The verdict of both orders.

    Args:
        reply_ab: read from the call that showed A first; its label "a" means the response shown first.
        reply_ba: read from the call that showed B first; its label "a" means that too, hence B.
    """
    orders = (("A first", reply_ab), ("B first", reply_ba))
    for status in _WORST_FIRST:
        reasons = [f"{order}: {v.reason}" for order, v in orders if v.status == status]
        if reasons:
            return PairVerdict(status, reason="; ".join(reasons))
    places: dict[str | None, Place] = {"a": "first", "b": "second"}
    try:
        shown_ab, shown_ba = places[reply_ab.label], places[reply_ba.label]
    except KeyError as label:
        raise ValueError(f"a comparison's label is 'a' or 'b', got {label}") from None
    if shown_ab == shown_ba:
        return PairVerdict("ok", "tie", shown_ab)
    return PairVerdict("ok", "a" if shown_ab == "first" else "b")


def sample_pairs(samples: pl.DataFrame) -> pl.DataFrame:
    """All pairs of samples of a prompt: k samples give k(k-1)/2.

    Args:
        samples: sample_id, prompt_id.

    Returns:
        prompt_id, sample_a, sample_b, with sample_a < sample_b, sorted: which sample is called A
        does not depend on the order of the rows.
    """
    grouped = samples.select("prompt_id", "sample_id").unique().sort("prompt_id", "sample_id")
    rows = [
        (prompt, a, b)
        for prompt, ids in grouped.group_by("prompt_id", maintain_order=True).agg("sample_id").iter_rows()
        for a, b in combinations(ids, 2)
    ]
    return pl.DataFrame(rows, {c: pl.String for c in ("prompt_id", "sample_a", "sample_b")}, orient="row")


def oriented(pairs: pl.DataFrame) -> pl.DataFrame:
    """The pairs with sample_a < sample_b; where samples change sides, so does the winner."""
    swap = pl.col("sample_a") > pl.col("sample_b")
    columns = {
        "sample_a": pl.min_horizontal("sample_a", "sample_b"),
        "sample_b": pl.max_horizontal("sample_a", "sample_b"),
    }
    if "winner" in pairs.columns:
        other = pl.col("winner").replace({"a": "b", "b": "a"})
        columns["winner"] = pl.when(swap).then(other).otherwise(pl.col("winner"))
    return pairs.with_columns(**columns)


def pair_frame(
    pairs: pl.DataFrame,
    verdicts: Sequence[PairVerdict],
    *,
    aspect: str,
    scorer: str,
    scorer_version: str,
    parser_version: str | None,
    call_keys: Sequence[Sequence[str]] | None = None,
) -> pl.DataFrame:
    """Rows of :data:`PAIRS`.

    Args:
        pairs: prompt_id, sample_a, sample_b (:func:`sample_pairs`); verdicts in the same order.
    """
    if len(verdicts) != pairs.height:
        raise ValueError(f"{pairs.height} pairs, but {len(verdicts)} verdicts")
    keys = [list(k) for k in call_keys] if call_keys is not None else [[] for _ in verdicts]
    columns = {
        name: [getattr(v, name) for v in verdicts] for name in ("winner", "favoured", "status", "reason")
    }
    told = {
        "aspect": aspect,
        "scorer": scorer,
        "scorer_version": scorer_version,
        "parser_version": parser_version,
    }
    return conform(
        pairs.select("prompt_id", "sample_a", "sample_b").with_columns(
            *(pl.Series(name, values, dtype=pl.String) for name, values in columns.items()),
            *(pl.lit(value, dtype=pl.String).alias(name) for name, value in told.items()),
            pl.Series("call_keys", keys, dtype=pl.List(pl.String)),
        ),
        PAIRS,
        "pairs",
    )


def ranking_feedback(pairs: pl.DataFrame) -> pl.DataFrame:
    """:data:`PAIRS` as rows of FEEDBACK: two a pair, one for each of its samples.

    ``value`` is 1 (won), 0.5 (tie) or 0 (lost), so that a sample's mean is its share of points;
    ``aspect`` names the opponent (:func:`versus`), which keeps (sample_id, aspect) a key.
    """
    rows = []
    for pair in pairs.iter_rows(named=True):
        points = _POINTS[pair["winner"]] if pair["winner"] else (None, None)
        ids = (pair["sample_a"], pair["sample_b"])
        for own, other, value in zip(ids, reversed(ids), points, strict=True):
            rows.append(_row(pair, own, versus(pair["aspect"], other), value))
    return pl.DataFrame(rows, FEEDBACK)


def win_feedback(pairs: pl.DataFrame, reference: str = "reference") -> pl.DataFrame:
    """Comparisons with a reference as rows of FEEDBACK, one a sample (``ask: win``).

    Args:
        pairs: rows of :data:`PAIRS` whose ``sample_a`` is the reference, whatever its id, and
            whose ``sample_b`` is the sample.
    """
    rows = []
    for pair in pairs.iter_rows(named=True):
        value = _POINTS[pair["winner"]][1] if pair["winner"] else None
        rows.append(_row(pair, pair["sample_b"], versus(pair["aspect"], reference), value))
    return pl.DataFrame(rows, FEEDBACK)


def versus(aspect: str, other: str) -> str:
    """The column ``aspect`` of a comparison's row: ``ranking vs 3f2a…``."""
    return f"{aspect} vs {other}"


def _row(pair: dict[str, object], sample_id: str, aspect: str, value: float | None) -> dict[str, object]:
    kept = ("status", "reason", "scorer", "scorer_version", "parser_version", "call_keys")
    label = None if value is None else _NAMES[value]
    named = {"sample_id": sample_id, "aspect": aspect, "kind": "ranking", "value": value, "label": label}
    return {**named, "text": None, **{name: pair[name] for name in kept}}
