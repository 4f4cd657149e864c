"""Best-of-n against all subsets, all draws and hand-computed values."""

from __future__ import annotations

import math
from itertools import combinations, product

import polars as pl
import pytest

from textalign_dagster.measures.best_of_n import chosen, expected_best, kl, kl_bound, win_rate

SCORES = [0.3, 2.0, 1.0, 1.0, -1.0]


@pytest.mark.parametrize("n", range(1, 6))
def test_the_expected_best_is_the_mean_over_all_subsets(n: int) -> None:
    maxima = [max(subset) for subset in combinations(SCORES, n)]
    assert expected_best(SCORES, n) == pytest.approx(sum(maxima) / len(maxima))


def test_n_above_the_number_of_scores_is_rejected() -> None:
    with pytest.raises(ValueError, match="2 scores for the best of 3"):
        expected_best([1.0, 2.0], 3)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_kl_and_win_rate_match_those_over_all_draws(n: int) -> None:
    """Five equally likely texts, two with equal scores: every draw of n takes the first of its best texts."""
    probabilities = [0.0] * 5
    for draw in product(range(5), repeat=n):
        probabilities[max(draw, key=lambda i: (SCORES[i], -draw.index(i)))] += 1 / 5**n
    assert kl(SCORES, n) == pytest.approx(sum(p * math.log(5 * p) for p in probabilities if p > 0))
    wins = sum(
        p * (sum(SCORES[i] > s for s in SCORES) + sum(SCORES[i] == s for s in SCORES) / 2) / 5
        for i, p in enumerate(probabilities)
    )
    assert win_rate(SCORES, n) == pytest.approx(wins)


def test_best_of_two_by_hand() -> None:
    """Two equally likely texts: best-of-2 takes the better one with probability 3/4."""
    assert kl([0.0, 1.0], 2) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert win_rate([0.0, 1.0], 2) == pytest.approx(0.75 * 0.75 + 0.25 * 0.25)
    assert kl_bound(1) == 0 and kl_bound(4) == pytest.approx(math.log(4) - 0.75)


def test_kl_is_zero_for_equal_scores_and_reaches_the_bound_for_many_distinct_ones() -> None:
    assert kl([1.0] * 8, 4) == 0 and win_rate([1.0] * 8, 4) == 0.5
    many = [float(i) for i in range(20_000)]
    assert kl(many, 4) == pytest.approx(kl_bound(4), abs=1e-3)
    assert win_rate(many, 4) == pytest.approx(4 / 5, abs=1e-3)
    assert kl(many[:50], 4) <= kl_bound(4)


def test_best_of_each_group_of_n_candidates() -> None:
    """Prompt p has five candidates: two groups of two and one left over. A tie goes to the first; NULL loses."""
    rows = pl.DataFrame(
        {
            "prompt_id": ["p", "q", "p", "p", "q", "p", "p"],
            "score": [1.0, None, 1.0, 0.0, -5.0, 3.0, 9.0],
            "at": list("abcdefg"),
        }
    )
    assert chosen(rows.rename({"at": "id"}), 2)["id"].to_list() == ["a", "e", "f"]
    assert chosen(rows.rename({"at": "id"}), 1).height == 7
    assert chosen(rows.rename({"at": "id"}), 4)["id"].to_list() == ["f"]
    unknown = pl.DataFrame({"prompt_id": ["p", "p"], "score": pl.Series([None, None], dtype=pl.Float64)})
    assert chosen(unknown, 2).height == 1
