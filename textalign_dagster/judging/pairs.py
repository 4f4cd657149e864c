"""Comparisons of two responses, always asked in both orders.

If the judge prefers the same response both times, it wins. If the judge prefers the same *position*
both times, that is a tie, counted as position bias. So swapping the two responses can only swap the
verdict.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import polars as pl

from textalign_dagster.judging.verdict import Status, Verdict
from textalign_dagster.tables import FEEDBACK, conform

Winner = Literal["a", "b", "tie"]
Place = Literal["first", "second"]

PAIRS = pl.Schema(
    {  # type: ignore[arg-type]  # mypy joins type classes and instances to object
        "prompt_id": pl.String,
        "sample_a": pl.String,  # key, with sample_b and aspect; the smaller id, or a reference's
        "sample_b": pl.String,  # in a comparison with a reference: the sample
        "aspect": pl.String,
        "winner": pl.String,  # a | b | tie; NULL: not ok
        "favoured": pl.String,  # of a tie: the position ("first", "second") that won both times
        "status": pl.String,
        "reason": pl.String,
        "scorer": pl.String,
        "scorer_version": pl.String,
        "parser_version": pl.String,
        "call_keys": pl.List(pl.String),  # A shown first, then B shown first
    }
)
"""One row per compared pair: two samples of one prompt, or a sample and its reference."""

WORST_FIRST: tuple[Status, ...] = ("failed", "unparseable", "skipped")
_POINTS = {"a": (1.0, 0.0), "b": (0.0, 1.0), "tie": (0.5, 0.5)}
_NAMES = {1.0: "win", 0.5: "tie", 0.0: "loss"}


@dataclass(frozen=True)
class PairVerdict:
    """The verdict on a pair from two calls.

    Attributes:
        winner: None unless ok.
        favoured: of a tie, the position that won both times; also None if no call was made (two
            samples with the same text).
    """

    status: Status
    winner: Winner | None = None
    favoured: Place | None = None
    reason: str | None = None


def pair_verdict(reply_ab: Verdict, reply_ba: Verdict) -> PairVerdict:
    """The verdict from both orders.

    Args:
        reply_ab: read from the call that showed A first; its label "a" means the response shown first.
        reply_ba: read from the call that showed B first; its label "a" means the same, i.e. B.
    """
    orders = (("A first", reply_ab), ("B first", reply_ba))
    for status in WORST_FIRST:
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
    call_keys: Sequence[list[str]],
    provenance: Mapping[str, str],
) -> pl.DataFrame:
    """Rows of :data:`PAIRS`.

    Args:
        pairs: prompt_id, sample_a, sample_b (`pair_draw.sample_pairs`); verdicts and call_keys in the same order.
        provenance: the columns aspect, scorer, scorer_version and parser_version.
    """
    if len(verdicts) != pairs.height:
        raise ValueError(f"{pairs.height} pairs, but {len(verdicts)} verdicts")
    columns = {
        name: [getattr(v, name) for v in verdicts] for name in ("winner", "favoured", "status", "reason")
    }
    return conform(
        pairs.select("prompt_id", "sample_a", "sample_b").with_columns(
            *(pl.Series(name, values, dtype=pl.String) for name, values in columns.items()),
            *(pl.lit(value, dtype=pl.String).alias(name) for name, value in provenance.items()),
            pl.Series("call_keys", call_keys, dtype=pl.List(pl.String)),
        ),
        PAIRS,
        "pairs",
    )


def ranking_feedback(
    pairs: pl.DataFrame, left_out: Mapping[str, str], provenance: Mapping[str, Any]
) -> pl.DataFrame:
    """:data:`PAIRS` as rows of FEEDBACK, one per sample: its share of points.

    ``value`` is the mean over the sample's usable pairs of 1 (won), 0.5 (tie) or 0 (lost). A sample
    without a usable pair has the worst status of its pairs.

    Args:
        left_out: sample_id → why it is in no pair.
        provenance: as in :func:`pair_frame`.
    """
    points: defaultdict[str, list[float]] = defaultdict(list)
    bad: defaultdict[str, dict[Status, str]] = defaultdict(dict)
    keys: defaultdict[str, list[str]] = defaultdict(list)
    ids: dict[str, None] = {}
    for pair in pairs.iter_rows(named=True):
        won = _POINTS[pair["winner"]] if pair["winner"] else (None, None)
        for sample_id, share in zip((pair["sample_a"], pair["sample_b"]), won, strict=True):
            ids[sample_id] = None
            keys[sample_id] += pair["call_keys"]
            if share is None:
                bad[sample_id].setdefault(pair["status"], pair["reason"])
            else:
                points[sample_id].append(share)
    rows = []
    for sample_id in ids:
        row = {"sample_id": sample_id, "kind": "ranking", "call_keys": keys[sample_id], **provenance}
        if points[sample_id]:
            row |= {"value": sum(points[sample_id]) / len(points[sample_id]), "status": "ok"}
        else:
            status = next(status for status in WORST_FIRST if status in bad[sample_id])
            row |= {"status": status, "reason": bad[sample_id][status]}
        rows.append(row)
    return pl.DataFrame([*rows, *_left_out(left_out, provenance)], FEEDBACK)


def win_feedback(
    pairs: pl.DataFrame, left_out: Mapping[str, str], provenance: Mapping[str, Any]
) -> pl.DataFrame:
    """Comparisons with a reference as rows of FEEDBACK, one per sample (``ask: win``).

    ``value`` is 1 (the sample won), 0.5 (tie) or 0; ``label`` is the same in words.

    Args:
        pairs: rows of :data:`PAIRS` whose ``sample_a`` is the reference, whatever its id, and
            whose ``sample_b`` is the sample.
        left_out, provenance: as in :func:`ranking_feedback`.
    """
    rows = []
    for pair in pairs.iter_rows(named=True):
        value = _POINTS[pair["winner"]][1] if pair["winner"] else None
        kept = {name: pair[name] for name in ("status", "reason", "call_keys")}
        judged = {"value": value, "label": None if value is None else _NAMES[value]}
        rows.append({"sample_id": pair["sample_b"], "kind": "ranking", **provenance, **kept, **judged})
    return pl.DataFrame([*rows, *_left_out(left_out, provenance)], FEEDBACK)


def pair_figures(pairs: pl.DataFrame) -> dict[str, float]:
    """Figures on comparisons: counts, the share tied, and the share of those asked that favoured a position."""
    usable = pairs.filter(pl.col("status") == "ok")
    asked = usable.filter(pl.col("call_keys").list.len() > 0)
    figures: dict[str, float] = {"pairs": pairs.height, "pairs unusable": pairs.height - usable.height}
    if usable.height:
        figures["pairs tied"] = usable.filter(winner="tie").height / usable.height
    if asked.height:
        figures["position bias"] = asked["favoured"].count() / asked.height
    return figures


def _left_out(left_out: Mapping[str, str], provenance: Mapping[str, Any]) -> list[dict[str, Any]]:
    shared = {"kind": "ranking", "status": "skipped", "call_keys": [], **provenance}
    return [{"sample_id": sample_id, "reason": reason, **shared} for sample_id, reason in left_out.items()]
