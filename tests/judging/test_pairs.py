"""Comparisons: both orders, ties by disagreement, and what swapping may change."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from textalign_dagster.judging import Verdict
from textalign_dagster.judging.pairs import (
    PAIRS,
    PairVerdict,
    oriented,
    pair_frame,
    pair_verdict,
    ranking_feedback,
    sample_pairs,
    win_feedback,
)
from textalign_dagster.judging.verdict import failed, skipped, unparseable
from textalign_dagster.tables import FEEDBACK

A, B = Verdict("ok", label="a"), Verdict("ok", label="b")
VERDICTS = [A, B, failed("down"), unparseable("what?"), skipped("not asked")]
SWAPPED = {"a": "b", "b": "a", "tie": "tie", None: None}


@pytest.mark.parametrize(
    ("ab", "ba", "winner", "favoured"),
    [
        (A, B, "a", None),  # A both times
        (B, A, "b", None),  # B both times
        (A, A, "tie", "first"),  # whichever came first
        (B, B, "tie", "second"),
    ],
)
def test_the_four_cases(ab: Verdict, ba: Verdict, winner: str, favoured: str | None) -> None:
    found = pair_verdict(ab, ba)
    assert (found.status, found.winner, found.favoured) == ("ok", winner, favoured)


def test_anything_unusable_has_a_status_and_no_winner() -> None:
    found = pair_verdict(A, unparseable("what?"))
    assert found == PairVerdict("unparseable", reason="B first: what?")
    assert pair_verdict(failed("down"), unparseable("what?")).reason == "A first: down"
    assert pair_verdict(skipped("x"), skipped("x")).status == "skipped"
    with pytest.raises(ValueError, match="'a' or 'b'"):
        pair_verdict(Verdict("ok", label="Harmful"), A)


@given(st.sampled_from(VERDICTS), st.sampled_from(VERDICTS))
def test_swapping_the_responses_swaps_the_verdict(one: Verdict, two: Verdict) -> None:
    # The same two calls, with the responses called B and A instead of A and B.
    found, swapped = pair_verdict(one, two), pair_verdict(two, one)
    assert swapped.winner == SWAPPED[found.winner]
    assert (swapped.status, swapped.favoured) == (found.status, found.favoured)


@given(st.integers(0, 100), st.integers(0, 100), st.floats(-20, 20), st.floats(0, 5))
def test_a_judge_with_a_bias_swaps_or_ties_but_never_contradicts_itself(
    quality_a: int, quality_b: int, bias: float, margin: float
) -> None:
    def judge(first: int, second: int) -> Verdict:
        return A if first - second + bias > margin else B

    found = pair_verdict(judge(quality_a, quality_b), judge(quality_b, quality_a))
    swapped = pair_verdict(judge(quality_b, quality_a), judge(quality_a, quality_b))
    assert swapped.winner == SWAPPED[found.winner]
    if found.winner != "tie":
        assert found.winner == ("a" if quality_a > quality_b else "b")


def test_all_pairs_of_a_prompt_whatever_the_order_of_rows() -> None:
    samples = pl.DataFrame(
        {"sample_id": ["s3", "s1", "s2", "t1", "u2", "u1"], "prompt_id": ["p", "p", "p", "q", "r", "r"]}
    )
    pairs = sample_pairs(samples)
    assert pairs.rows() == [("p", "s1", "s2"), ("p", "s1", "s3"), ("p", "s2", "s3"), ("r", "u1", "u2")]
    assert sample_pairs(samples.reverse()).equals(pairs)
    assert sample_pairs(samples.clear()).is_empty()


def frame(verdicts: list[PairVerdict]) -> pl.DataFrame:
    ids = [("p", f"a{i}", f"b{i}") for i in range(len(verdicts))]
    pairs = pl.DataFrame(ids, {c: pl.String for c in ("prompt_id", "sample_a", "sample_b")}, orient="row")
    return pair_frame(
        pairs,
        verdicts,
        aspect="ranking",
        scorer="judge",
        scorer_version="1",
        parser_version="1",
        call_keys=[["x", "y"] for _ in verdicts],
    )


def test_rows_for_both_samples_of_a_pair() -> None:
    pairs = frame([pair_verdict(A, B), pair_verdict(A, A), pair_verdict(A, failed("down"))])
    assert pairs.schema == PAIRS
    rows = ranking_feedback(pairs)
    assert rows.schema == FEEDBACK
    assert rows.select("sample_id", "aspect", "value", "label", "status").rows() == [
        ("a0", "ranking vs b0", 1.0, "win", "ok"),
        ("b0", "ranking vs a0", 0.0, "loss", "ok"),
        ("a1", "ranking vs b1", 0.5, "tie", "ok"),
        ("b1", "ranking vs a1", 0.5, "tie", "ok"),
        ("a2", "ranking vs b2", None, None, "failed"),
        ("b2", "ranking vs a2", None, None, "failed"),
    ]
    assert rows["reason"].to_list()[-1] == "B first: down"
    assert rows["call_keys"].to_list()[0] == ["x", "y"]


def test_rows_against_a_reference() -> None:
    rows = win_feedback(frame([pair_verdict(A, B), pair_verdict(B, A), pair_verdict(B, B)]))
    assert rows.select("sample_id", "aspect", "value", "label").rows() == [
        ("b0", "ranking vs reference", 0.0, "loss"),
        ("b1", "ranking vs reference", 1.0, "win"),
        ("b2", "ranking vs reference", 0.5, "tie"),
    ]


def test_orientation_keeps_the_meaning() -> None:
    pairs = pl.DataFrame(
        {"sample_a": ["y", "x", "y"], "sample_b": ["x", "y", "x"], "winner": ["a", "a", None]}
    )
    assert oriented(pairs).rows() == [("x", "y", "b"), ("x", "y", "a"), ("x", "y", None)]
    assert oriented(oriented(pairs)).equals(oriented(pairs))
