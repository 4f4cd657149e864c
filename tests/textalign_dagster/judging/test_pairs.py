"""Comparisons: both orders, ties by disagreement, and what swapping can change."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from textalign_dagster.judging import Verdict
from textalign_dagster.judging.pair_draw import drawn_pairs, sample_pairs, schedule
from textalign_dagster.judging.pairs import (
    PAIRS,
    PairVerdict,
    oriented,
    pair_figures,
    pair_frame,
    pair_verdict,
    ranking_feedback,
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
        (A, A, "tie", "first"),  # whichever was shown first
        (B, B, "tie", "second"),
    ],
)
def test_verdicts_of_both_orders(ab: Verdict, ba: Verdict, winner: str, favoured: str | None) -> None:
    verdict = pair_verdict(ab, ba)
    assert (verdict.status, verdict.winner, verdict.favoured) == ("ok", winner, favoured)


def test_unusable_replies_give_a_status_and_no_winner() -> None:
    verdict = pair_verdict(A, unparseable("what?"))
    assert verdict == PairVerdict("unparseable", reason="B first: what?")
    assert pair_verdict(failed("down"), unparseable("what?")).reason == "A first: down"
    assert pair_verdict(skipped("x"), skipped("x")).status == "skipped"
    with pytest.raises(ValueError, match="'a' or 'b'"):
        pair_verdict(Verdict("ok", label="Harmful"), A)


@given(st.sampled_from(VERDICTS), st.sampled_from(VERDICTS))
def test_swapping_the_responses_swaps_the_verdict(ab: Verdict, ba: Verdict) -> None:
    # The same two calls, with the responses labelled B and A instead of A and B.
    verdict, swapped = pair_verdict(ab, ba), pair_verdict(ba, ab)
    assert swapped.winner == SWAPPED[verdict.winner]
    assert (swapped.status, swapped.favoured) == (verdict.status, verdict.favoured)


@given(st.integers(0, 100), st.integers(0, 100), st.floats(-20, 20), st.floats(0, 5))
def test_biased_judge_swaps_or_ties_but_never_contradicts_itself(
    quality_a: int, quality_b: int, bias: float, margin: float
) -> None:
    def judge(first: int, second: int) -> Verdict:
        return A if first - second + bias > margin else B

    verdict = pair_verdict(judge(quality_a, quality_b), judge(quality_b, quality_a))
    swapped = pair_verdict(judge(quality_b, quality_a), judge(quality_a, quality_b))
    assert swapped.winner == SWAPPED[verdict.winner]
    if verdict.winner != "tie":
        assert verdict.winner == ("a" if quality_a > quality_b else "b")


def test_all_pairs_of_a_prompt_regardless_of_row_order() -> None:
    samples = pl.DataFrame(
        {"sample_id": ["s3", "s1", "s2", "t1", "u2", "u1"], "prompt_id": ["p", "p", "p", "q", "r", "r"]}
    )
    pairs = sample_pairs(samples)
    assert pairs.rows() == [("p", "s1", "s2"), ("p", "s1", "s3"), ("p", "s2", "s3"), ("r", "u1", "u2")]
    assert sample_pairs(samples.reverse()).equals(pairs)
    assert sample_pairs(samples.clear()).is_empty()


@given(st.integers(0, 40))
def test_every_prefix_of_the_schedule_is_balanced(count: int) -> None:
    seen: set[frozenset[int]] = set()
    times = [0] * count
    for first, second in schedule(count):
        seen.add(frozenset((first, second)))
        times[first] += 1
        times[second] += 1
        assert max(times) - min(times) <= 1
    assert len(seen) == count * (count - 1) // 2
    assert all(len(pair) == 2 for pair in seen)


@given(st.permutations([f"s{n}" for n in range(7)]), st.integers(1, 30))
def test_draw_depends_only_on_the_ids(ids: list[str], limit: int) -> None:
    drawn = drawn_pairs(ids, limit)
    assert drawn == drawn_pairs(sorted(ids), limit)
    assert len(set(drawn)) == len(drawn) == min(limit, 21)
    assert all(a < b for a, b in drawn)


def test_different_samples_have_different_pairs() -> None:
    draws = {tuple(drawn_pairs([f"{n}{i}" for i in "abcdef"], 3)) for n in range(30)}
    positions = {tuple((a[-1], b[-1]) for a, b in pairs) for pairs in draws}
    assert len(positions) > 10, "the draw must not always take the same positions"


PROVENANCE = {"aspect": "ranking", "scorer": "judge", "scorer_version": "1", "parser_version": "1"}


def frame(*compared: tuple[str, str, PairVerdict]) -> pl.DataFrame:
    ids = [("p", a, b) for a, b, _ in compared]
    pairs = pl.DataFrame(ids, dict.fromkeys(("prompt_id", "sample_a", "sample_b"), pl.String), orient="row")
    keys = [[f"{a}{b}", f"{b}{a}"] for a, b, _ in compared]
    return pair_frame(pairs, [v for *_, v in compared], keys, PROVENANCE)


def test_a_sample_has_one_row_with_its_share_of_points() -> None:
    down, odd = pair_verdict(A, failed("down")), pair_verdict(unparseable("what?"), A)
    pairs = frame(
        ("s", "t", pair_verdict(A, B)),  # s beats t
        ("s", "u", pair_verdict(A, A)),  # a tie
        ("s", "v", down),
        ("u", "v", odd),
        ("v", "w", pair_verdict(skipped("x"), skipped("x"))),
    )
    assert pairs.schema == PAIRS
    rows = ranking_feedback(pairs, {"z": "alone"}, PROVENANCE)
    assert rows.schema == FEEDBACK
    assert rows.select("sample_id", "value", "status", "reason").rows() == [
        ("s", 0.75, "ok", None),
        ("t", 0.0, "ok", None),
        ("u", 0.5, "ok", None),
        ("v", None, "failed", "B first: down"),  # the worst of its pairs
        ("w", None, "skipped", "A first: x; B first: x"),
        ("z", None, "skipped", "alone"),
    ]
    assert set(rows["kind"]) == {"ranking"} and set(rows["aspect"]) == {"ranking"}
    assert rows["call_keys"].to_list()[0] == ["st", "ts", "su", "us", "sv", "vs"]


def test_rows_against_a_reference() -> None:
    pairs = frame(
        ("ref", "s", pair_verdict(A, B)), ("ref", "t", pair_verdict(B, A)), ("ref", "u", pair_verdict(B, B))
    )
    rows = win_feedback(pairs, {"z": "none"}, PROVENANCE)
    assert rows.select("sample_id", "value", "label", "status", "reason").rows() == [
        ("s", 0.0, "loss", "ok", None),
        ("t", 1.0, "win", "ok", None),
        ("u", 0.5, "tie", "ok", None),
        ("z", None, None, "skipped", "none"),
    ]
    assert rows["call_keys"].to_list()[1] == ["reft", "tref"]


def test_figures_of_comparisons() -> None:
    pairs = frame(
        ("s", "t", pair_verdict(A, B)),
        ("s", "u", pair_verdict(A, A)),
        ("t", "u", pair_verdict(B, A)),
        ("u", "v", pair_verdict(A, failed("down"))),
    )
    without_calls = frame(("t", "v", PairVerdict("ok", "tie"))).with_columns(
        call_keys=pl.lit([], pl.List(pl.String))
    )
    assert pair_figures(pl.concat([pairs, without_calls])) == {
        "pairs": 5,
        "pairs unusable": 1,
        "pairs tied": 0.5,
        "position bias": pytest.approx(1 / 3),
    }
    assert pair_figures(pairs.clear()) == {"pairs": 0, "pairs unusable": 0}


def test_orienting_pairs_keeps_their_meaning() -> None:
    pairs = pl.DataFrame(
        {"sample_a": ["y", "x", "y"], "sample_b": ["x", "y", "x"], "winner": ["a", "a", None]}
    )
    assert oriented(pairs).rows() == [("x", "y", "b"), ("x", "y", "a"), ("x", "y", None)]
    assert oriented(oriented(pairs)).equals(oriented(pairs))
