"""Do ratings and rankings of the same samples agree? (After Bansal et al., 2023, arXiv:2308.15812.)

Ratings become rankings (the higher rating wins, equal ones tie) and are compared with the rankings a
judge gave directly. A disagreement means little without knowing how often the judge agrees with
itself, so repeats are measured the same way, and so is its position bias.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import polars as pl

from textalign_dagster.feedback_files.agreement import Agreement, agreement
from textalign_dagster.judging.pairs import oriented
from textalign_dagster.measures.bootstrap import RESAMPLES, Estimate, estimate, mean, ratio_sums

_KEYS = ("sample_a", "sample_b")


@dataclass(frozen=True)
class Coverage:
    """How many pairs the agreement is based on; pairs with a missing judgement are excluded.

    Attributes:
        pairs: requested.
        ranked: with a usable ranking.
        rated: with a usable rating of both samples.
        both: with both; these are counted.
    """

    pairs: int
    ranked: int
    rated: int
    both: int


@dataclass(frozen=True)
class Consistency:
    """Agreement between ratings and rankings, and the baselines to compare it with.

    Attributes:
        agreement: rows are the rankings that follow from ratings, columns the direct ones; classes a and b
            are the pairs' own sample_a and sample_b.
        coverage: how many of the requested pairs are counted.
        rating_repeats: the same for rankings that follow from two rounds of ratings; None without repeats.
        ranking_repeats: the same for two rounds of direct rankings; None without repeats.
        position: the judge's bias towards the response shown first.
    """

    agreement: Agreement
    coverage: Coverage
    position: PositionBias
    rating_repeats: Agreement | None = None
    ranking_repeats: Agreement | None = None


@dataclass(frozen=True)
class PositionBias:
    """The effect of the order in which responses are shown.

    Attributes:
        first_wins: share of calls won by the response shown first; 0.5 without bias. Undefined where
            only the combined verdicts of both orders are known: it would always be 0.5.
        flips: share of pairs in which the same position won both times (they count as ties).
    """

    first_wins: Estimate
    flips: Estimate


def consistency(
    ratings: pl.DataFrame,
    pairs: pl.DataFrame,
    *,
    repeated_ratings: tuple[pl.DataFrame, pl.DataFrame] | None = None,
    repeated_pairs: pl.DataFrame | None = None,
    margin: float = 0.0,
    resamples: int = RESAMPLES,
) -> Consistency:
    """The consistency between a judge's (or two judges') ratings and rankings.

    Args:
        ratings: sample_id, value, status; one row per sample (FEEDBACK, one aspect).
        pairs: prompt_id, sample_a, sample_b, winner, favoured, status; one row per pair (PAIRS).
        repeated_ratings: two rounds of ratings by the same judge. (``ratings`` may be means of them, which
            agree with each other more than single ones do.)
        repeated_pairs: the same pairs, judged again.
        margin: ratings that differ by no more than this tie.

    Raises:
        ValueError: a sample is rated twice, or a pair is listed twice.
    """
    agree = partial(agreement, resamples=resamples)
    direct, rated = ranked(pairs), rated_pairs(pairs, ratings, margin)
    both = _joined(rated, direct)
    rounds = [rated_pairs(pairs, one, margin) for one in repeated_ratings or ()]
    ranked_again = ranked(oriented(repeated_pairs)) if repeated_pairs is not None else None
    return Consistency(
        agreement=agree(both),
        coverage=Coverage(pairs.height, direct.height, rated.height, both.height),
        position=position_bias(pairs, resamples=resamples),
        rating_repeats=agree(_joined(*rounds)) if rounds else None,
        ranking_repeats=agree(_joined(oriented(direct), ranked_again)) if ranked_again is not None else None,
    )


def ranked(pairs: pl.DataFrame) -> pl.DataFrame:
    """The usable direct rankings: prompt_id, sample_a, sample_b, winner."""
    _unique(oriented(pairs), list(_KEYS), "pairs")
    usable = pairs.filter((pl.col("status") == "ok") & pl.col("winner").is_not_null())
    return usable.select("prompt_id", *_KEYS, "winner")


def rated_pairs(pairs: pl.DataFrame, ratings: pl.DataFrame, margin: float = 0.0) -> pl.DataFrame:
    """The rankings that follow from ratings, for pairs where both samples have a usable one."""
    _unique(ratings, ["sample_id"], "ratings")
    usable = ratings.filter((pl.col("status") == "ok") & pl.col("value").is_not_null())
    values = usable.select("sample_id", "value")
    joined = pairs.select("prompt_id", *_KEYS)
    for side in ("a", "b"):
        own = values.rename({"sample_id": f"sample_{side}", "value": f"value_{side}"})
        joined = joined.join(own, on=f"sample_{side}", how="inner")
    gap = pl.col("value_a") - pl.col("value_b")
    winner = pl.when(gap > margin).then(pl.lit("a")).when(gap < -margin).then(pl.lit("b"))
    return joined.select("prompt_id", *_KEYS, winner=winner.otherwise(pl.lit("tie")))


def position_bias(pairs: pl.DataFrame, *, resamples: int = RESAMPLES) -> PositionBias:
    """P(first wins) over both calls of every usable pair, and the share of pairs that flip.

    A pair with a winner has one call won by the first position; one that flipped has two or none. Ties
    of unknown direction (imported ones) count as flips only.
    """
    usable = pairs.filter(pl.col("status") == "ok")
    by_call = (usable["favoured"].is_not_null() | (usable["call_keys"].list.len() > 0)).any()
    prompts = usable["prompt_id"].to_list()
    flipped = (usable["winner"] == "tie").to_list()
    by_position = {"first": 2.0, "second": 0.0}
    favoured = usable["favoured"].to_list()
    wins = [
        (by_position.get(f) if flip else 1.0) if by_call else None
        for flip, f in zip(flipped, favoured, strict=True)
    ]
    return PositionBias(
        first_wins=estimate(ratio_sums(wins, [2.0] * len(wins), prompts), resamples=resamples),
        flips=mean([float(flip) for flip in flipped], prompts, resamples=resamples),
    )


def _joined(first: pl.DataFrame, second: pl.DataFrame) -> pl.DataFrame:
    """prompt_id, first, second: the winners of the pairs in both frames."""
    return first.join(second, on=list(_KEYS), how="inner", suffix="_second").select(
        "prompt_id", first=pl.col("winner"), second=pl.col("winner_second")
    )


def _unique(frame: pl.DataFrame, key: list[str], what: str) -> None:
    repeated = frame.filter(pl.struct(key).is_duplicated())
    if repeated.height:
        raise ValueError(
            f"{what}: {', '.join(map(str, repeated.select(key).row(0)))} is listed more than once; "
            "pass one aspect from one judge"
        )
