"""Ratings against rankings, with every number worked out by hand."""

from __future__ import annotations

import polars as pl
import pytest

from textalign_dagster.feedback_files.agreement import CLASSES, agreement
from textalign_dagster.feedback_files.consistency import consistency, position_bias, rated_pairs

READINGS = {"prompt_id": pl.String, "first": pl.String, "second": pl.String}


def readings(counts: list[list[int]], prompts: int = 1) -> pl.DataFrame:
    rows = [
        (f"p{n % prompts}", CLASSES[i], CLASSES[j])
        for i, row in enumerate(counts)
        for j, count in enumerate(row)
        for n in range(count)
    ]
    return pl.DataFrame(rows, READINGS, orient="row")


def test_agreement_table_by_hand() -> None:
    # p_o = (6+2+5)/20 = 0.65; p_e = (9·8 + 4·5 + 7·7)/400 = 141/400; κ = (0.65-0.3525)/(1-0.3525)
    found = agreement(readings([[6, 2, 1], [1, 2, 1], [1, 1, 5]], prompts=4), resamples=200)
    assert found.matrix == ((6, 2, 1), (1, 2, 1), (1, 1, 5))
    assert found.agreement.value == pytest.approx(0.65)
    assert found.decisive.value == pytest.approx(11 / 13)
    assert (found.decisive.rows, found.agreement.rows, found.agreement.n) == (13, 20, 4)
    assert found.kappa.value == pytest.approx(0.2975 / 0.6475)
    for estimate in (found.agreement, found.decisive, found.kappa):
        assert estimate.lo is not None and estimate.hi is not None and estimate.value is not None
        assert estimate.lo <= estimate.value <= estimate.hi


def test_extremes() -> None:
    same = agreement(readings([[3, 0, 0], [0, 2, 0], [0, 0, 4]]))
    assert (same.agreement.value, same.decisive.value, same.kappa.value) == (1, 1, 1)
    opposite = agreement(readings([[0, 0, 5], [0, 0, 0], [5, 0, 0]]))
    assert (opposite.agreement.value, opposite.kappa.value) == (0, -1)
    chance = agreement(readings([[1, 1, 1], [1, 1, 1], [1, 1, 1]]))
    assert chance.kappa.value == pytest.approx(0)


def test_undefined_is_none() -> None:
    nothing = agreement(readings([[0] * 3] * 3))
    assert (nothing.agreement.value, nothing.decisive.value, nothing.kappa.value) == (None, None, None)
    ties = agreement(readings([[0, 0, 0], [0, 4, 0], [0, 0, 0]], prompts=2))
    assert (ties.agreement.value, ties.decisive.value, ties.kappa.value) == (1, None, None)
    one_prompt = agreement(readings([[2, 0, 1], [0, 0, 0], [0, 0, 1]]))
    assert one_prompt.agreement.value == 0.75 and one_prompt.agreement.lo is None


def test_intervals_resample_prompts() -> None:
    # Two prompts, each unanimous: resampling prompts gives 0, 1/2 or 1.
    frame = pl.DataFrame([("p", "a", "a")] * 50 + [("q", "a", "b")] * 50, READINGS, orient="row")
    found = agreement(frame, resamples=400).agreement
    assert (found.lo, found.value, found.hi) == (0, 0.5, 1)
    assert agreement(frame, resamples=50) == agreement(frame, resamples=50)


def test_unknown_classes_are_rejected() -> None:
    with pytest.raises(ValueError, match="column second: 'equal' is not one of a, tie, b"):
        agreement(pl.DataFrame([("p", "a", "equal")], READINGS, orient="row"))


def ratings(values: dict[str, float | None]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "sample_id": list(values),
            "value": list(values.values()),
            "status": ["ok" if v is not None else "failed" for v in values.values()],
        },
        {"sample_id": pl.String, "value": pl.Float64, "status": pl.String},
    )


def pairs(*rows: tuple[str, str, str, str | None, str | None]) -> pl.DataFrame:
    names = ("prompt_id", "sample_a", "sample_b", "winner", "favoured")
    frame = pl.DataFrame(rows, {name: pl.String for name in names}, orient="row")
    status = pl.when(pl.col("winner").is_null()).then(pl.lit("failed")).otherwise(pl.lit("ok"))
    # With recorded calls, as pairs of our own judge have them; see from_a_file.
    return frame.with_columns(status=status, call_keys=pl.lit(["c1", "c2"]))


def from_a_file(frame: pl.DataFrame) -> pl.DataFrame:
    """The same pairs, but with only the combined verdicts known."""
    return frame.with_columns(call_keys=pl.lit([], dtype=pl.List(pl.String)))


RATED = ratings({"s1": 7, "s2": 5, "s3": 5, "t1": 2, "t2": 3, "u1": 4, "u2": None})
RANKED = pairs(
    ("p", "s1", "s2", "a", None),  # rated a: agrees
    ("p", "s1", "s3", "b", None),  # rated a: disagrees
    ("p", "s2", "s3", "tie", "first"),  # rated tie: agrees
    ("q", "t1", "t2", "tie", "second"),  # rated b: disagrees
    ("r", "u1", "u2", "a", None),  # not rated
    ("q", "t1", "t3", None, None),  # neither
)


def test_ratings_against_rankings() -> None:
    found = consistency(RATED, RANKED, resamples=50)
    assert found.agreement.matrix == ((1, 0, 1), (0, 1, 0), (0, 1, 0))
    assert found.agreement.agreement.value == 0.5
    assert found.agreement.decisive.value == 0.5
    # p_e = (2·1 + 1·2 + 1·1)/16 = 5/16
    assert found.agreement.kappa.value == pytest.approx((0.5 - 5 / 16) / (1 - 5 / 16))
    coverage = found.coverage
    assert (coverage.pairs, coverage.ranked, coverage.rated, coverage.both) == (6, 5, 4, 4)
    assert found.rating_repeats is None and found.ranking_repeats is None


def test_order_within_pairs_is_kept() -> None:
    other = pairs(("p", "s3", "s1", "a", None), ("p", "s2", "s3", "tie", None), ("q", "t2", "t1", "a", None))
    # Ratings say s3 < s1, s2 = s3, t2 > t1; the first of each pair is the file's first.
    assert consistency(RATED, other, resamples=50).agreement.matrix == ((1, 0, 0), (0, 1, 0), (1, 0, 0))


def test_position_bias_by_hand() -> None:
    # Calls won by the first place: 1+1+2+0+1 of 10. Pairs that flipped: 2 of 5.
    found = position_bias(RANKED)
    assert found.first_wins.value == pytest.approx(0.5)
    assert found.flips.value == pytest.approx(0.4)
    biased = position_bias(pairs(("p", "a", "b", "tie", "first"), ("q", "c", "d", "a", None)))
    assert biased.first_wins.value == pytest.approx(0.75)
    unknown = position_bias(pairs(("p", "a", "b", "tie", None), ("q", "c", "d", "a", None)))
    assert (unknown.first_wins.value, unknown.first_wins.rows, unknown.flips.value) == (0.5, 1, 0.5)
    # From combined verdicts alone it would be 0.5 whatever the judge did, so it cannot be measured.
    combined = position_bias(from_a_file(pairs(("p", "a", "b", "tie", None), ("q", "c", "d", "a", None))))
    assert (combined.first_wins.value, combined.flips.value) == (None, 0.5)
    nothing = position_bias(pairs())
    assert (nothing.first_wins.value, nothing.flips.value) == (None, None)


def test_self_agreement_of_the_judge() -> None:
    again = pairs(
        ("p", "s2", "s1", "b", None),  # the same pair the other way round: s1 wins again
        ("p", "s1", "s3", "a", None),
        ("p", "s2", "s3", None, None),
    )
    found = consistency(
        RATED,
        RANKED,
        repeated_ratings=(RATED, ratings({"s1": 6, "s2": 6, "s3": 5})),
        repeated_pairs=again,
        resamples=50,
    )
    assert found.ranking_repeats is not None and found.rating_repeats is not None
    assert found.ranking_repeats.matrix == ((1, 0, 0), (0, 0, 0), (1, 0, 0))
    assert found.rating_repeats.matrix == ((1, 1, 0), (1, 0, 0), (0, 0, 0))


def test_margin() -> None:
    assert rated_pairs(RANKED, RATED, margin=1)["winner"].to_list() == ["a", "a", "tie", "tie"]
    assert rated_pairs(RANKED, RATED)["winner"].to_list() == ["a", "a", "tie", "b"]


def test_empty_input() -> None:
    found = consistency(ratings({}), pairs())
    assert found.agreement.agreement.value is None and found.coverage.pairs == 0


def test_duplicate_rows_are_rejected() -> None:
    with pytest.raises(ValueError, match="ratings: s1 is listed more than once"):
        consistency(pl.concat([RATED, RATED.head(1)]), RANKED)
    swapped = pairs(("p", "s2", "s1", "a", None))
    with pytest.raises(ValueError, match="pairs: s1, s2 is listed more than once"):
        consistency(RATED, pl.concat([RANKED, swapped]))
