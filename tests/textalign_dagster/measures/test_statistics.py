"""Estimates against numbers worked out by hand, and intervals against a known distribution."""

from __future__ import annotations

import math
import warnings

import numpy as np
import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from textalign_dagster.measures.bootstrap import difference, estimate, mean, mean_sums, ratio_sums
from textalign_dagster.measures.correlation import average_ranks, correlation, pearson, spearman
from textalign_dagster.measures.diversity import distinct_n_blocks, distinct_n_per_prompt, distinct_n_words
from textalign_dagster.measures.statistics import (
    continuation_perplexity,
    perplexity,
    perplexity_mean,
    text_perplexity,
)

# Means and ratios


def test_mean_over_samples_and_over_prompts() -> None:
    values, prompts = [1.0, 3.0, 8.0], ["p", "p", "q"]
    assert mean(values, prompts).value == 4.0
    assert mean(values, prompts, "prompt").value == 5.0
    result = mean(values, prompts)
    assert (result.n, result.rows) == (2, 3)
    assert result.lo is not None and result.hi is not None and result.lo <= 4.0 <= result.hi


def test_mean_over_the_maximum_of_each_prompt() -> None:
    values, prompts = [1.0, 3.0, None, -8.0, None], ["p", "p", "p", "q", "r"]
    result = mean(values, prompts, "prompt_max")
    assert (result.value, result.n, result.rows) == ((3.0 - 8.0) / 2, 2, 3)
    assert (result.lo, result.hi) == (-8.0, 3.0)
    assert mean([], [], "prompt_max").value is None


def test_missing_values_are_left_out_not_counted_as_zero() -> None:
    result = mean([1.0, None, float("nan"), 3.0], ["p", "p", "q", "r"])
    assert (result.value, result.n, result.rows) == (2.0, 2, 2)
    series = pl.Series([1, None, 3])
    assert mean(series, pl.Series(["p", "q", "r"])).value == 2.0


def test_undefined_is_none() -> None:
    for result in (mean([], []), mean([None], ["p"])):
        assert (result.value, result.lo, result.hi, result.n, result.rows) == (None, None, None, 0, 0)
    nothing = estimate(ratio_sums([1.0, 2.0], [0.0, 0.0], ["p", "q"]))
    assert (nothing.value, nothing.lo, nothing.hi, nothing.n) == (None, None, None, 2)


def test_one_prompt_has_a_value_but_no_interval() -> None:
    result = mean([1.0, 2.0, 3.0], ["p", "p", "p"])
    assert (result.value, result.lo, result.hi) == (2.0, None, None)


def test_no_interval_where_many_resamples_are_undefined() -> None:
    # Only one of three prompts has a denominator; 30 % of the resamples miss it.
    result = estimate(ratio_sums([1.0, 0.0, 0.0], [2.0, 0.0, 0.0], ["p", "q", "r"]))
    assert (result.value, result.lo, result.hi) == (0.5, None, None)


def test_a_constant_has_a_zero_width_interval() -> None:
    result = mean([0.0] * 6, list("abcdef"))
    assert (result.value, result.lo, result.hi) == (0.0, 0.0, 0.0)


def test_perplexity_is_weighted_by_tokens() -> None:
    # 10 nats over 10 tokens and 2 nats over 30: exp(12 / 40).
    result = perplexity([10.0, 2.0], [10, 30], ["p", "q"])
    assert result.value == pytest.approx(math.exp(0.3))
    assert result.lo == pytest.approx(math.exp(2 / 30))
    assert result.hi == pytest.approx(math.exp(1.0))
    assert perplexity([0.0], [0], ["p"]).value is None


def test_overflowing_perplexity_is_undefined() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert perplexity([1e6, 1e6], [1, 1], ["p", "q"]).value is None


def test_the_published_perplexities_by_hand() -> None:
    # Toxicity: 12 nats for prompt and continuation, 5 for the prompt alone, 4 more tokens.
    assert continuation_perplexity(12.0, 5.0, 4) == pytest.approx(math.exp(7 / 4))
    assert continuation_perplexity(5.0, 5.0, 0) is None  # an empty continuation
    assert continuation_perplexity(1e6, 0.0, 1) == math.inf
    # Summaries: exp of minus the mean log-probability of the text's own tokens.
    assert text_perplexity([-1.0, -2.0, -3.0]) == pytest.approx(math.exp(2.0))
    assert text_perplexity([math.log(0.5)] * 7) == pytest.approx(2.0)
    assert text_perplexity([]) is None


def test_perplexity_mean_excludes_empty_and_improbable_samples() -> None:
    nll = [math.log(2.0) * 3, math.log(8.0) * 2, 0.0, math.log(9999.0), math.log(10000.5), None]
    result = perplexity_mean(nll, [3, 2, 0, 1, 1, None], ["p", "q", "q", "r", "s", "t"])
    assert result.value == pytest.approx((2.0 + 8.0 + 9999.0) / 3)
    assert (result.n, result.rows) == (3, 3)
    assert perplexity_mean([None], [None], ["p"]).value is None
    # `perplexity` weights by tokens and differs.
    assert perplexity(nll[:2], [3, 2], ["p", "q"]).value == pytest.approx((2.0**3 * 8.0**2) ** (1 / 5))


def test_intervals_are_reproducible_and_depend_on_the_seed() -> None:
    rng = np.random.default_rng(0)
    values, prompts = rng.normal(size=200), [str(i % 40) for i in range(200)]
    assert mean(values, prompts, seed=1) == mean(values, prompts, seed=1)
    assert mean(values, prompts, seed=1) != mean(values, prompts, seed=2)
    narrow, wide = mean(values, prompts, level=0.5), mean(values, prompts, level=0.99)
    assert wide.lo < narrow.lo < narrow.hi < wide.hi  # type: ignore[operator]


def test_samples_of_a_prompt_are_not_independent() -> None:
    """Copies of every sample add no information: the interval must not become narrower."""
    rng = np.random.default_rng(1)
    values, prompts = rng.normal(size=50), [str(i) for i in range(50)]
    once = mean(values, prompts)
    copied = mean(np.repeat(values, 20), np.repeat(prompts, 20))
    assert copied.hi - copied.lo == pytest.approx(once.hi - once.lo)  # type: ignore[operator]


def test_intervals_cover_the_truth() -> None:
    """Coverage of 95 % intervals, 60 prompts of 4 samples, prompt effects as large as the noise."""
    rng = np.random.default_rng(2)
    prompts = np.repeat([str(i) for i in range(60)], 4)
    trials, covered = 300, 0
    for trial in range(trials):
        values = np.repeat(rng.normal(size=60), 4) + rng.normal(size=240)
        result = mean(values, prompts, resamples=300, seed=trial)
        covered += result.lo <= 0.0 <= result.hi  # type: ignore[operator]
    # Binomial(300, 0.94) has a standard deviation of 1.4 points.
    assert 0.89 <= covered / trials <= 0.985


def test_large_problems_are_resampled_in_chunks() -> None:
    """More entries than fit in one chunk still yield the expected interval width."""
    rng = np.random.default_rng(3)
    n = 30_000
    result = mean(rng.normal(size=n), [str(i) for i in range(n)], resamples=200)
    assert result.hi - result.lo == pytest.approx(2 * 1.96 / n**0.5, rel=0.25)  # type: ignore[operator]


# Differences


def test_the_difference_is_paired_on_shared_prompts() -> None:
    first = mean_sums([1.0, 2.0, 100.0], ["p", "q", "only first"])
    second = mean_sums([0.0, 1.0, 50.0, 60.0], ["p", "q", "x", "y"])
    result = difference(first, second)
    assert (result.value, result.lo, result.hi) == (1.0, 1.0, 1.0)
    assert (result.n, result.only_first, result.only_second, result.rows) == (2, 1, 2, 4)


def test_pairing_removes_shared_prompt_effects() -> None:
    rng = np.random.default_rng(4)
    hardness = rng.normal(scale=10, size=100)
    prompts = [str(i) for i in range(100)]
    one = mean_sums(hardness + 0.5 + rng.normal(scale=0.1, size=100), prompts)
    two = mean_sums(hardness + rng.normal(scale=0.1, size=100), prompts)
    paired = difference(one, two)
    assert paired.lo > 0.4 and paired.hi < 0.6  # type: ignore[operator]
    single = estimate(one)
    assert single.hi - single.lo > 3  # type: ignore[operator]


def test_difference_without_shared_prompts_is_undefined() -> None:
    result = difference(mean_sums([1.0], ["p"]), mean_sums([1.0], ["q"]))
    assert (result.value, result.lo, result.hi, result.n) == (None, None, None, 0)


# distinct-n

GOLDEN = ["a b a", "b c"]


@pytest.mark.parametrize(("n", "expected"), [(1, 3 / 5), (2, 3 / 5), (3, 1 / 5), (4, 0.0)])
def test_distinct_n_pooled(n: int, expected: float) -> None:
    assert distinct_n_words(GOLDEN, n) == expected


def test_distinct_n_without_words_is_undefined() -> None:
    assert distinct_n_words([], 1) is None
    assert distinct_n_words(["", " \n"], 2) is None
    assert distinct_n_per_prompt([""], ["p"], 1).value is None
    assert distinct_n_blocks(["a"], ["p"], 1, block=2).value is None


def test_distinct_n_per_prompt() -> None:
    # Prompt p: 3 words, 2 different; q: 2 of 2; r is empty and left out.
    result = distinct_n_per_prompt(["a b", "a", "b c", ""], ["p", "p", "q", "r"], 1)
    assert result.value == pytest.approx((2 / 3 + 1) / 2)
    assert (result.n, result.rows) == (2, 3)
    # Bigrams of p: "a b"; of q: "b c"; the denominator is the number of words.
    result = distinct_n_per_prompt(["a b", "a", "b c"], ["p", "p", "q"], 2)
    assert result.value == pytest.approx((1 / 3 + 1 / 2) / 2)


def test_distinct_n_in_blocks_does_not_depend_on_the_number_of_samples() -> None:
    rng = np.random.default_rng(5)
    texts = [" ".join(rng.choice(list("abcdefghijklmnop"), size=5)) for _ in range(4000)]
    prompts = [str(i) for i in range(4000)]
    few, many = (distinct_n_blocks(texts[:k], prompts[:k], 2, block=50) for k in (1000, 4000))
    assert (few.n, few.rows, many.n) == (20, 1000, 80)
    assert few.value == pytest.approx(many.value, rel=0.03)
    assert distinct_n_words(texts, 2) < 0.5 * distinct_n_words(texts[:1000], 2)  # type: ignore[operator]


def test_distinct_n_does_not_depend_on_the_order_of_rows() -> None:
    texts, prompts = ["a b", "a", "b c", "d", "e a"], ["p", "p", "q", "r", "r"]
    back = texts[::-1], prompts[::-1]
    assert distinct_n_blocks(texts, prompts, 1, block=2) == distinct_n_blocks(*back, 1, block=2)
    one, two = distinct_n_per_prompt(texts, prompts, 1), distinct_n_per_prompt(*back, 1)
    assert (one.lo, one.hi, one.n) == (two.lo, two.hi, two.n)


# Correlations


def test_pearson_by_hand() -> None:
    # Deviations (-1, 0, 1) and (-1, 1, 0) from the means: 1 / sqrt(2 * 2).
    assert pearson([1, 2, 3], [1, 3, 2]) == pytest.approx(0.5)
    assert pearson([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)


def test_spearman_by_hand() -> None:
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1.0)
    # Ranks (1, 2.5, 2.5, 4) and (1, 2, 3, 4): 4.5 / sqrt(4.5 * 5).
    assert spearman([0, 1, 1, 2], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(22.5))


def test_average_ranks() -> None:
    assert average_ranks(np.array([5.0, 1.0, 5.0, 2.0])).tolist() == [3.5, 1.0, 3.5, 2.0]


@pytest.mark.parametrize(
    ("x", "y"),
    [([], []), ([1.0], [2.0]), ([1.0, 1.0], [1.0, 2.0]), ([0.1] * 3, [1.0, 2.0, 3.0])],
)
def test_correlation_without_variation_is_undefined(x: list[float], y: list[float]) -> None:
    assert pearson(x, y) is None and spearman(x, y) is None
    result = correlation(x, y, [str(i) for i in range(len(x))])
    assert (result.value, result.lo, result.hi) == (None, None, None)


def test_pairs_with_a_missing_value_are_left_out() -> None:
    assert pearson([1.0, 2.0, None, 3.0], [1.0, 3.0, 9.0, 2.0]) == pytest.approx(0.5)


def test_correlation_interval() -> None:
    rng = np.random.default_rng(6)
    x = rng.normal(size=400)
    y = 0.6 * x + 0.8 * rng.normal(size=400)
    for kind in ("pearson", "spearman"):
        result = correlation(x, y, [str(i) for i in range(400)], kind)
        assert result.lo < result.value < result.hi  # type: ignore[operator]
        # Fisher: a standard error of (1 - r²) / sqrt(n).
        expected = 2 * 1.96 * (1 - result.value**2) / 20  # type: ignore[operator]
        assert result.hi - result.lo == pytest.approx(expected, rel=0.3)  # type: ignore[operator]


numbers = st.floats(-1e6, 1e6)


@given(st.lists(st.tuples(numbers, numbers), max_size=30))
def test_correlations_are_symmetric_and_bounded(pairs: list[tuple[float, float]]) -> None:
    x, y = [a for a, _ in pairs], [b for _, b in pairs]
    for function in (pearson, spearman):
        r = function(x, y)
        assert r == function(y, x)
        assert r is None or -1 <= r <= 1


@given(st.lists(st.tuples(st.integers(0, 5), numbers), min_size=1, max_size=30), st.integers(0, 9))
def test_an_interval_lies_within_the_range_of_values(pairs: list[tuple[int, float]], seed: int) -> None:
    result = mean([v for _, v in pairs], [str(p) for p, _ in pairs], "prompt", resamples=50, seed=seed)
    values = [v for _, v in pairs]
    slack = 1e-6 + 1e-9 * max(abs(v) for v in values)
    if result.lo is not None and result.hi is not None:
        assert min(values) - slack <= result.lo <= result.hi <= max(values) + slack


# Invalid input


def test_errors_name_the_invalid_argument() -> None:
    with pytest.raises(ValueError, match="length"):
        mean([1.0], ["p", "q"])
    with pytest.raises(ValueError, match="clusters"):
        mean([1.0], [None])
    with pytest.raises(ValueError, match="level"):
        mean([1.0, 2.0], ["p", "q"], level=95)
    with pytest.raises(ValueError, match="n-gram"):
        distinct_n_words(["a"], 0)
    with pytest.raises(ValueError, match="block"):
        distinct_n_blocks(["a"], ["p"], 1, block=0)
