"""Quantile labels against sizes and orders worked out by hand."""

from __future__ import annotations

import itertools
from collections import Counter

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from textalign_dagster.ids import content_hash
from textalign_dagster.pool.quantiles import QuantileSettings, quantile_labels

ABC = ["a", "b", "c", "d", "e"]


def pool(values: list[float | None], prompts: list[str] | None = None) -> pl.DataFrame:
    """Rows whose insertion order is that of the list."""
    return pl.DataFrame(
        {
            "sample_id": [content_hash(i) for i in range(len(values))],
            "prompt_id": prompts or ["p"] * len(values),
            "position": list(range(len(values))),
            "value": values,
        },
        schema={
            "sample_id": pl.String,
            "prompt_id": pl.String,
            "position": pl.Int64,
            "value": pl.Float64,
        },
    )


def labels(
    values: list[float | None],
    k: int = 5,
    prompts: list[str] | None = None,
    settings: QuantileSettings | None = None,
) -> list[str | None]:
    return quantile_labels(pool(values, prompts), ABC[:k], settings).to_list()


def sizes(assigned: list[str | None], k: int = 5) -> list[int]:
    counts = Counter(assigned)
    return [counts[name] for name in ABC[:k]]


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (96, [19, 19, 19, 19, 20]),
        (14, [2, 2, 2, 2, 6]),
        (3, [0, 0, 0, 0, 3]),
        (5, [1, 1, 1, 1, 1]),
        (0, [0, 0, 0, 0, 0]),
    ],
)
def test_published_sizes(n: int, expected: list[int]) -> None:
    assert sizes(labels([float(i) for i in range(n)])) == expected


def test_best_rewards_get_the_first_label() -> None:
    assert labels([1.0, 5.0, 3.0, 2.0, 4.0]) == ["e", "a", "c", "d", "b"]


@pytest.mark.parametrize(
    ("n", "expected"),
    [(14, [3, 3, 2, 3, 3]), (96, [19, 19, 20, 19, 19]), (6, [1, 1, 2, 1, 1]), (10, [2] * 5)],
)
def test_spread_remainder(n: int, expected: list[int]) -> None:
    assigned = labels([float(i) for i in range(n)], settings=QuantileSettings(remainder="spread"))
    assert sizes(assigned) == expected


def test_fewer_samples_than_quantiles() -> None:
    values = [1.0, 3.0, 2.0]
    assert labels(values, settings=QuantileSettings(few="worst")) == ["e", "e", "e"]
    assert labels(values, settings=QuantileSettings(few="spread")) == ["e", "a", "c"]
    assert labels(values, settings=QuantileSettings(few="none")) == [None, None, None]
    # The rule for few samples is independent of the rule for the remainder.
    both = QuantileSettings(few="worst", remainder="spread")
    assert labels(values, settings=both) == ["e", "e", "e"]


def test_ties_are_split_in_insertion_order_or_share_the_better_label() -> None:
    values = [1.0, 2.0, 2.0, 2.0, 0.0, 3.0]
    # Sorted: 3 2 2 2 1 0, in pairs for K = 3.
    assert labels(values, k=3) == ["c", "a", "b", "b", "c", "a"]
    share = QuantileSettings(ties="share")
    assert labels(values, k=3, settings=share) == ["c", "a", "a", "a", "c", "a"]
    assert labels([0.0, -0.0, 0.0], k=3, settings=share) == ["a", "a", "a"]
    # A tie in one prompt is not a tie with another prompt.
    assigned = labels([1.0, 0.0, 0.0, -1.0], k=2, prompts=["p", "p", "q", "q"], settings=share)
    assert assigned == ["a", "b", "a", "b"]


def test_missing_rewards_are_not_ranked() -> None:
    assert labels([None, 1.0, None, 2.0], k=2) == [None, "b", None, "a"]
    assert labels([None, None], k=2) == [None, None]


def test_per_prompt_and_per_pool() -> None:
    values, prompts = [10.0, 9.0, 2.0, 1.0], ["p", "p", "q", "q"]
    assert labels(values, k=2, prompts=prompts) == ["a", "b", "a", "b"]
    whole = QuantileSettings(per="pool")
    assert labels(values, k=2, prompts=prompts, settings=whole) == ["a", "a", "b", "b"]


def test_one_label() -> None:
    assert labels([1.0, 2.0], k=1) == ["a", "a"]


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="labels"):
        quantile_labels(pool([1.0]), [])
    with pytest.raises(ValueError, match="labels"):
        quantile_labels(pool([1.0]), ["a", "a"])
    with pytest.raises(ValueError, match=r"value.*NULL"):
        labels([float("nan"), 1.0])
    with pytest.raises(ValidationError, match="ties"):
        QuantileSettings.model_validate({"ties": "random"})
    with pytest.raises(ValidationError, match="tie"):
        QuantileSettings.model_validate({"tie": "split"})


def every_setting() -> list[QuantileSettings]:
    options = itertools.product(("split", "share"), ("last", "spread"), ("worst", "spread", "none"))
    return [QuantileSettings.model_validate({"ties": t, "remainder": r, "few": f}) for t, r, f in options]


rewards = st.lists(st.one_of(st.none(), st.integers(-3, 3).map(float)), max_size=40)


@given(rewards, st.integers(1, 5), st.sampled_from(every_setting()), st.randoms())
def test_order_of_rows_does_not_matter(values, k, settings, random) -> None:  # type: ignore[no-untyped-def]
    rows = pool(values)
    order = list(range(len(values)))
    random.shuffle(order)
    direct = quantile_labels(rows, ABC[:k], settings).to_list()
    shuffled = quantile_labels(rows[order], ABC[:k], settings).to_list()
    assert shuffled == [direct[i] for i in order]


@given(rewards, st.integers(1, 5), st.sampled_from(every_setting()))
def test_a_better_reward_never_gets_a_worse_label(values, k, settings) -> None:  # type: ignore[no-untyped-def]
    assigned = labels(values, k=k, settings=settings)
    pairs = [(v, ABC.index(x)) for v, x in zip(values, assigned, strict=True) if x is not None]
    assert all(x <= y for (v, x), (w, y) in itertools.product(pairs, pairs) if v > w)
    if settings.ties == "share":
        assert all(x == y for (v, x), (w, y) in itertools.product(pairs, pairs) if v == w)
    ranked = sum(v is not None for v in values)
    assert len(pairs) == (0 if settings.few == "none" and ranked < k else ranked)


@given(rewards, st.integers(1, 5))
def test_published_rule_implemented_naively(values: list[float | None], k: int) -> None:
    """Against a naive implementation of the rule with a list and a counter."""
    known = [(v, i) for i, v in enumerate(values) if v is not None]
    ranking = sorted(known, key=lambda pair: pair[0], reverse=True)  # stable
    size = len(ranking) // k
    expected: list[str | None] = [None] * len(values)
    for number, (_, i) in enumerate(ranking):
        expected[i] = ABC[min(number // size, k - 1)] if size else ABC[k - 1]
    assert labels(values, k=k) == expected


@given(st.integers(0, 60), st.integers(1, 5))
def test_spread_sizes_differ_by_at_most_one(n: int, k: int) -> None:
    settings = QuantileSettings(remainder="spread", few="spread")
    assigned = sizes(labels([float(i) for i in range(n)], k=k, settings=settings), k=k)
    assert sum(assigned) == n and max(assigned) - min(assigned) <= 1
