"""The pool against hand-computed cases, an oracle in plain Python, and properties that must hold."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from textalign_dagster.ids import content_hash, derive_seed
from textalign_dagster.pool.datapool import Pool, build_pool, drop_earlier
from textalign_dagster.pool.draw import DRAWN_REASONS, REASONS
from textalign_dagster.pool.quantiles import QuantileSettings
from textalign_dagster.settings.pool import PoolSettings, largest_remainder
from textalign_dagster.tables import DATAPOOL

LABELS = ["good", "fair", "bad"]
SCHEMA = {
    "sample_id": pl.String,
    "prompt_id": pl.String,
    "origin": pl.Int32,
    "position": pl.Int64,
    "value": pl.Float64,
    "label": pl.String,
    "condition": pl.String,
    "n_tokens": pl.Int32,
    "status": pl.String,
}


def sample(number: int, **fields: Any) -> dict[str, Any]:
    return {
        "sample_id": content_hash("sample", number),
        "prompt_id": "p",
        "origin": 1,
        "position": number,
        "value": None,
        "label": "good",
        "condition": None,
        "n_tokens": 10,
        "status": "ok",
    } | fields


def table(samples: Sequence[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(list(samples), schema=SCHEMA)


def labelled(text: str, **fields: Any) -> pl.DataFrame:
    """One sample per letter, in insertion order: g, f and b are labels; a capital letter is over-long."""
    words = {"g": "good", "f": "fair", "b": "bad"}
    return table(
        [
            sample(i, label=words[c.lower()], n_tokens=64 if c.isupper() else 10, **fields)
            for i, c in enumerate(text)
        ]
    )


def build(rows: pl.DataFrame, settings: PoolSettings | None = None, **more: Any) -> Pool:
    arguments = {"current": 1, "labels": LABELS, "seed": 7, "pool_hash": "h", "sampling_limit": 64}
    return build_pool(rows, settings or PoolSettings(), **(arguments | more))


def reasons(pool: Pool) -> Counter[str]:
    return Counter(pool.rows["reason"].to_list())


def drawn_labels(pool: Pool) -> Counter[str]:
    return Counter(pool.rows.filter("drawn")["label"].to_list())


def shortfall(pool: Pool, label: str) -> dict[str, Any]:
    return pool.shortfalls.row(by_predicate=pl.col("label") == label, named=True)


# By hand: a fixed number per label


def test_per_bucket_takes_m_of_every_label() -> None:
    pool = build(labelled("ggggffffbbbb"), PoolSettings(samples_per_bucket=2))
    assert drawn_labels(pool) == {"good": 2, "fair": 2, "bad": 2}
    assert reasons(pool) == {"quota": 6, "bucket full": 6}
    assert (pool.groups, pool.wanted, pool.drawn) == (1, 6, 6)


def test_over_long_samples_only_top_up() -> None:
    pool = build(labelled("gGGGgg" + "fFF" + "BBB"), PoolSettings(samples_per_bucket=2))
    assert Counter(pool.rows.select("label", "reason").rows()) == {
        ("good", "quota"): 2,
        ("good", "bucket full"): 1,
        ("good", "over-long"): 3,
        ("fair", "quota"): 1,
        ("fair", "top-up"): 1,
        ("fair", "over-long"): 1,
        ("bad", "top-up"): 2,
        ("bad", "over-long"): 1,
    }
    assert shortfall(pool, "bad")["over_long"] == 2


def test_a_sample_at_the_limit_is_over_long() -> None:
    rows = table([sample(0, n_tokens=63), sample(1, n_tokens=64)])
    pool = build(rows, PoolSettings(samples_per_bucket=1), labels=["good"])
    assert pool.rows.filter("drawn")["n_tokens"].to_list() == [63]
    pool = build(rows, PoolSettings(samples_per_bucket=2, max_tokens=63), labels=["good"])
    assert reasons(pool) == {"top-up": 2}


def test_an_unknown_length_is_not_over_long() -> None:
    rows = table([sample(0, n_tokens=None), sample(1, n_tokens=64)])
    pool = build(rows, PoolSettings(samples_per_bucket=1), labels=["good"])
    assert pool.rows.sort("reason")["reason"].to_list() == ["over-long", "quota"]


def test_per_bucket_never_fills_from_other_labels() -> None:
    pool = build(labelled("ggggg"), PoolSettings(samples_per_bucket=2))
    assert drawn_labels(pool) == {"good": 2}
    assert shortfall(pool, "bad") == {
        "label": "bad",
        "groups": 1,
        "wanted": 2,
        "obtained": 0,
        "short": 2,
        "groups_short": 1,
        "over_long": 0,
        "filled": 0,
    }


def test_without_a_limit_everything_with_a_label_is_drawn() -> None:
    pool = build(labelled("gGfb"), sampling_limit=None)
    assert reasons(pool) == {"everything": 4} and pool.wanted is None
    assert pool.shortfalls["wanted"].to_list() == [None] * 3
    assert pool.shortfalls["short"].to_list() == [0] * 3
    assert pool.shortfalls["obtained"].to_list() == [2, 1, 1]


def test_without_labels_everything_is_drawn() -> None:
    rows = table([sample(0, label=None), sample(1, label=None, status="failed")])
    pool = build(rows, labels=[])
    assert reasons(pool) == {"everything": 1, "feedback failed": 1}
    assert pool.shortfalls.height == 0


# By hand: a fixed total


def test_samples_are_split_equally_and_the_rest_is_filled_in_insertion_order() -> None:
    # 8 over 3 labels: 2 each and 2 left over, which are filled with the first unused samples.
    rows = labelled("ggggggffffffbbbbbb")
    pool = build(rows, PoolSettings(samples=8))
    assert reasons(pool) == {"quota": 6, "fill": 2, "bucket full": 10}
    joined = pool.rows.join(rows.select("sample_id", "position"), on="sample_id")
    unused = joined.filter(pl.col("reason") != "quota").sort("position")
    assert unused["reason"].to_list()[:2] == ["fill", "fill"]


def test_an_unmet_quota_is_filled_regardless_of_length() -> None:
    # Only one "bad": its second place goes to the first unused sample, here an over-long one.
    rows = labelled("GggFffb")
    pool = build(rows, PoolSettings(samples=6))
    first = content_hash("sample", 0)
    assert pool.rows.filter(sample_id=first)["reason"].to_list() == ["fill"]
    assert reasons(pool) == {"quota": 5, "fill": 1, "over-long": 1}
    assert shortfall(pool, "bad")["short"] == 1 and shortfall(pool, "good")["filled"] == 1
    assert pool.drawn == pool.wanted == 6


def test_insertion_order_starts_with_the_earliest_iteration() -> None:
    rows = table([sample(0, origin=2), sample(1, origin=1), sample(2, origin=1), sample(3, origin=2)])
    pool = build(rows, PoolSettings(samples=1, drop_factor=0.0), labels=["good", "bad"], current=2)
    # One sample over two labels: no quota at all, so the first inserted sample is the fill.
    assert pool.rows.filter("drawn")["sample_id"].to_list() == [content_hash("sample", 1)]


def test_fill_can_be_disabled_or_shuffled() -> None:
    rows = labelled("g" * 40)
    none = build(rows, PoolSettings(samples=6, fill="none"))
    assert reasons(none) == {"quota": 2, "bucket full": 38}
    assert (none.wanted, none.drawn) == (6, 2)
    shuffled = build(rows, PoolSettings(samples=6, fill="shuffled"))
    assert reasons(shuffled) == {"quota": 2, "fill": 4, "bucket full": 34}
    insertion = build(rows, PoolSettings(samples=6))
    assert not shuffled.rows.equals(insertion.rows)


def test_fewer_samples_than_wanted_are_all_drawn() -> None:
    pool = build(labelled("gGb"), PoolSettings(samples=8))
    assert pool.drawn == 3 and pool.wanted == 8


def test_shares() -> None:
    rows = labelled("g" * 20 + "f" * 20 + "b" * 20)
    shares = {"good": 0.5, "fair": 0.3, "bad": 0.2}
    pool = build(rows, PoolSettings(samples=10, shares=shares))
    assert drawn_labels(pool) == {"good": 5, "fair": 3, "bad": 2}
    pool = build(rows, PoolSettings(samples=10, shares={"good": 1, "bad": 1}))
    assert drawn_labels(pool) == {"good": 5, "bad": 5}


@pytest.mark.parametrize(
    ("total", "weights", "expected"),
    [
        (8, [1, 1, 1], [3, 3, 2]),
        (100, [0.29, 0.71], [29, 71]),
        (7, [0.5, 0.25, 0.25], [3, 2, 2]),
        (1, [0.4, 0.6], [0, 1]),
        (5, [0.0, 1.0], [0, 5]),
        (10, [0.1, 0.2, 0.7], [1, 2, 7]),
    ],
)
def test_largest_remainder(total: int, weights: list[float], expected: list[int]) -> None:
    assert largest_remainder(total, weights) == expected


# Groups, feedback statuses, origins


def test_balancing_per_prompt_or_over_the_whole_pool() -> None:
    rows = table([sample(i, prompt_id=f"p{i % 4}", label=LABELS[i % 3]) for i in range(48)])
    assert build(rows, PoolSettings(samples_per_bucket=2)).drawn == 4 * 3 * 2
    whole = build(rows, PoolSettings(samples_per_bucket=2, per="pool"))
    assert whole.drawn == 3 * 2 and whole.groups == 1


def test_only_samples_with_ok_feedback_are_drawn() -> None:
    rows = table(
        [
            sample(0),
            sample(1, status="failed"),
            sample(2, status="unparseable", label=None),
            sample(3, status="skipped", label=None),
            sample(4, label=None),
            sample(5, label="stray"),
        ]
    )
    pool = build(rows)
    reason_by_position = dict(pool.rows.join(rows, on="sample_id").select("position", "reason").rows())
    assert reason_by_position == {
        0: "everything",
        1: "feedback failed",
        2: "feedback unparseable",
        3: "feedback skipped",
        4: "no label",
        5: "label not in use",
    }
    # A failed judgement has no label, whatever its row contains.
    assert pool.rows.filter(reason="feedback failed")["label"].to_list() == [None]


def test_a_prompt_whose_feedback_all_failed_counts_as_short() -> None:
    rows = table([sample(0), sample(1, prompt_id="q", status="failed")])
    pool = build(rows, PoolSettings(samples_per_bucket=1), labels=["good"])
    assert shortfall(pool, "good")["groups_short"] == 1 and pool.wanted == 2 and pool.drawn == 1


def test_by_default_only_the_current_iteration_is_drawn() -> None:
    rows = table([sample(i, origin=1 + i % 3) for i in range(9)])
    pool = build(rows, current=3)
    assert reasons(pool) == {"everything": 3, "dropped: earlier iteration": 6}
    assert pool.rows.filter("drawn")["origin"].unique().to_list() == [3]


def test_nothing_is_dropped_at_factor_0() -> None:
    rows = table([sample(i, origin=1 + i % 3) for i in range(9)])
    assert reasons(build(rows, PoolSettings(drop_factor=0.0), current=3)) == {"everything": 9}


def test_every_iteration_drops_samples_again() -> None:
    # 11 of iteration 1, 4 of iteration 2, 1 of iteration 3; half is kept each time, rounded down:
    # iteration 2 keeps 5 and has 9; iteration 3 keeps 4 of those 9.
    rows = table([sample(i, origin=1) for i in range(11)] + [sample(20 + i, origin=2) for i in range(4)])
    settings = PoolSettings(drop_factor=0.5)
    second = build(rows, settings, current=2)
    assert reasons(second) == {"everything": 9, "dropped: earlier iteration": 6}
    later = table([sample(30, origin=3)])
    third = build(pl.concat([rows, later]), settings, current=3)
    assert reasons(third) == {"everything": 5, "dropped: earlier iteration": 11}
    survivors = set(second.rows.filter("drawn")["sample_id"])
    assert set(third.rows.filter(pl.col("drawn") & (pl.col("origin") < 3))["sample_id"]) <= survivors


def test_dropping_per_label() -> None:
    rows = table(
        [sample(i, origin=1, label="good" if i < 3 else "bad") for i in range(8)] + [sample(9, origin=2)]
    )
    pool = build(rows, PoolSettings(drop_factor=0.5, drop_by="group_and_label"), current=2)
    kept = pool.rows.filter(pl.col("drawn") & (pl.col("origin") == 1))
    assert Counter(kept["label"].to_list()) == {"good": 1, "bad": 2}  # int(1.5) and int(2.5)
    dropped = drop_earlier(rows, 0.5, 7, "group_and_label", current=2)
    assert sorted(rows.filter(~dropped)["sample_id"]) == sorted(pool.rows.filter("drawn")["sample_id"])


def test_drop_factor_rounds_as_published() -> None:
    # int(10 * (1 - 0.9)) is 0 in floating point, as in the released code.
    rows = table([sample(i) for i in range(10)])
    assert drop_earlier(rows, 0.9, 0, current=2).sum() == 10
    assert drop_earlier(rows, 0.5, 0, current=2).sum() == 5
    assert drop_earlier(rows, 0.5, 0, current=1).sum() == 0


def test_quantiles_cover_only_samples_left_in_the_pool() -> None:
    # The best rewards are from iteration 1, which is dropped: they take up no quantile.
    rows = table(
        [sample(i, origin=1, value=100.0 + i, label=None) for i in range(6)]
        + [sample(10 + i, origin=2, value=float(i), label=None) for i in range(6)]
    )
    pool = build(rows, current=2, quantiles=QuantileSettings())
    current = pool.rows.filter(origin=2).sort("value", descending=True)
    assert current["label"].to_list() == ["good"] * 2 + ["fair"] * 2 + ["bad"] * 2
    assert pool.rows.filter(origin=1)["label"].null_count() == 6
    kept = build(rows, PoolSettings(drop_factor=0.0), current=2, quantiles=QuantileSettings())
    assert kept.rows.filter(origin=1)["label"].to_list().count("good") == 4


def test_published_pool_of_96_samples_per_prompt() -> None:
    rows = table([sample(i, value=float(i % 50), label=None) for i in range(96)])
    five = ["1", "2", "3", "4", "5"]
    pool = build(rows, PoolSettings(samples_per_bucket=2), labels=five, quantiles=QuantileSettings())
    assert Counter(pool.rows["label"].to_list()) == dict.fromkeys("1234", 19) | {"5": 20}
    assert pool.drawn == 10


def test_too_few_rewards_for_quantiles_do_not_crash() -> None:
    # The released code fails on both: an empty bucket, and a prompt without any reward.
    rows = table([sample(i, value=float(i), label=None) for i in range(2)])
    none = table([sample(5, prompt_id="q", label=None, status="failed")])
    settings = PoolSettings(samples_per_bucket=2)
    pool = build(pl.concat([rows, none]), settings, quantiles=QuantileSettings())
    assert drawn_labels(pool) == {"bad": 2}


def test_conditions_come_from_labels_or_from_the_rows() -> None:
    rows = table([sample(0, condition="own words"), sample(1, label="bad"), sample(2, label=None)])
    by_row = build(rows)
    assert sorted(by_row.rows["condition"].to_list(), key=str) == [None, None, "own words"]
    texts = {"good": "Good.", "fair": "Fair.", "bad": "Bad."}
    by_label = build(rows.drop("condition"), conditions=texts)
    assert by_label.rows.sort("label")["condition"].to_list() == [None, "Bad.", "Good."]
    with pytest.raises(ValueError, match=r"conditions.*fair"):
        build(rows, conditions={"good": "Good.", "bad": "Bad."})


def test_weights_pass_through() -> None:
    rows = table([sample(0), sample(1)]).with_columns(weight=pl.Series([0.25, 4.0]))
    assert sorted(build(rows).rows["weight"].to_list()) == [0.25, 4.0]
    assert build(rows.drop("weight")).rows["weight"].to_list() == [1.0, 1.0]


def test_an_empty_pool() -> None:
    pool = build(table([]), PoolSettings(samples=8))
    assert pool.rows.height == 0 and pool.rows.schema == DATAPOOL
    assert (pool.groups, pool.wanted, pool.drawn) == (0, 0, 0)
    assert pool.shortfalls["obtained"].to_list() == [0, 0, 0]
    assert build(table([]), current=4, quantiles=QuantileSettings()).drawn == 0


# Invalid input


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"samples": 8, "samples_per_bucket": 2}, "samples_per_bucket"),
        ({"samples_per_bucket": 2, "shares": {"a": 1.0}}, "shares"),
        ({"samples_per_bucket": 2, "fill": "none"}, "fill"),
        ({"samples": 8, "shares": {"a": -1.0}}, "shares"),
        ({"samples": 8, "shares": {"a": 0.0}}, "shares"),
        ({"samples": 8, "shares": {"a": float("nan")}}, "shares"),
        ({"drop_factor": 1.5}, "drop_factor"),
        ({"samples": 0}, "samples"),
        ({"samples": "8"}, "samples"),
        ({"sample": 8}, "sample"),
    ],
)
def test_impossible_settings_are_refused(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValidationError, match=named):
        PoolSettings.model_validate(fields)


def test_every_setting_has_a_description() -> None:
    for model in (PoolSettings, QuantileSettings):
        assert all(field.description for field in model.model_fields.values())


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        (table([sample(0), sample(0)]), "sample_id.*more than once"),
        (table([sample(0, sample_id="row-1")]), "sample_id.*row-1"),
        (table([sample(0, sample_id=None)]), "sample_id"),
        (table([sample(0, status="fine")]), "status.*fine"),
        (table([sample(0, status=None)]), "status"),
        (table([sample(0, prompt_id=None)]), "prompt_id"),
        (table([sample(0, origin=2)]), "origin.*future"),
        (table([sample(0)]).drop("n_tokens"), "n_tokens"),
        (table([sample(0)]).drop("label"), "label"),
    ],
)
def test_invalid_rows_are_rejected(rows: pl.DataFrame, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build(rows)


def test_a_draw_needs_labels_and_a_length_limit() -> None:
    with pytest.raises(ValueError, match="label"):
        build(labelled("g"), PoolSettings(samples=2), labels=[])
    with pytest.raises(ValueError, match="max_tokens"):
        build(labelled("g"), PoolSettings(samples=2), sampling_limit=None)
    with pytest.raises(ValueError, match=r"shares.*excellent"):
        build(labelled("g"), PoolSettings(samples=2, shares={"excellent": 1.0}))


# The oracle: the published procedure for one prompt, with lists and loops

Item = tuple[str, int, int]  # sample_id, label, tokens


def oracle_key(sample_id: str, seed: int) -> int:
    """splitmix64's finaliser in Python integers."""
    mask = 2**64 - 1
    z = (int(sample_id[:16], 16) ^ seed) + 0x9E3779B97F4A7C15 & mask
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
    z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
    return z ^ z >> 31


def oracle_bucket(bucket: list[Item], want: int, limit: int, seed: int) -> dict[str, str]:
    shuffled = sorted(bucket, key=lambda item: oracle_key(item[0], seed))
    taken: dict[str, str] = {}
    for sample_id, _, tokens in shuffled:
        if tokens < limit and len(taken) < want:
            taken[sample_id] = "quota"
    for sample_id, _, tokens in shuffled:
        if tokens >= limit and len(taken) < want:
            taken[sample_id] = "top-up"
    return taken


def oracle(items: list[Item], settings: PoolSettings, limit: int, k: int, seed: int) -> dict[str, str]:
    """Drawn samples of one prompt and why; items are in insertion order."""
    taken: dict[str, str] = {}
    if settings.samples_per_bucket is not None:
        for label in range(k):
            bucket = [item for item in items if item[1] == label]
            taken |= oracle_bucket(bucket, settings.samples_per_bucket, limit, seed)
        return taken
    assert settings.samples is not None
    leftover = settings.samples % k
    for label in range(k):
        bucket = [item for item in items if item[1] == label]
        drawn = oracle_bucket(bucket, settings.samples // k, limit, seed)
        leftover += settings.samples // k - len(drawn)
        taken |= drawn
    for sample_id, _, _ in items:
        if leftover > 0 and sample_id not in taken:
            taken[sample_id] = "fill"
            leftover -= 1
    return taken


samples_of_pools = st.lists(
    st.tuples(
        st.integers(0, 3),  # prompt
        st.integers(0, 3),  # label; 3 is none
        st.integers(1, 3),  # iteration
        st.sampled_from([10, 63, 64, 70]),  # tokens
        st.sampled_from(["ok", "ok", "ok", "failed", "unparseable", "skipped"]),
    ),
    max_size=60,
)
limits = st.one_of(
    st.builds(lambda m: {"samples_per_bucket": m}, st.integers(1, 5)),
    st.builds(lambda s: {"samples": s}, st.integers(1, 14)),
    st.builds(lambda s: {"samples": s, "fill": "none"}, st.integers(1, 14)),
    st.builds(lambda s: {"samples": s, "fill": "shuffled"}, st.integers(1, 14)),
    st.builds(lambda s: {"samples": s, "shares": {"good": 2, "bad": 1}}, st.integers(1, 14)),
    st.just({}),
)
all_settings = st.builds(
    lambda limit, drop, by, per: PoolSettings.model_validate(
        {"drop_factor": drop, "drop_by": by, "per": per} | limit
    ),
    limits,
    st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    st.sampled_from(["group", "group_and_label"]),
    st.sampled_from(["prompt", "pool"]),
)


def random_table(drawn: list[tuple[int, int, int, int, str]]) -> pl.DataFrame:
    return table(
        [
            sample(
                i,
                prompt_id=f"p{prompt}",
                label=LABELS[label] if label < 3 else None,
                origin=origin,
                n_tokens=tokens,
                status=status,
                value=float(tokens),
            )
            for i, (prompt, label, origin, tokens, status) in enumerate(drawn)
        ]
    )


@given(
    samples_of_pools,
    st.one_of(
        st.builds(lambda m: PoolSettings(samples_per_bucket=m, drop_factor=0.0), st.integers(1, 5)),
        st.builds(lambda s: PoolSettings(samples=s, drop_factor=0.0), st.integers(1, 14)),
    ),
    st.integers(0, 2**63 - 1),
)
def test_the_draw_matches_the_published_procedure(drawn, settings, seed) -> None:  # type: ignore[no-untyped-def]
    rows = random_table(drawn)
    pool = build(rows, settings, seed=seed, current=3)
    prompts: dict[str, list[Item]] = defaultdict(list)
    usable = rows.filter((pl.col("status") == "ok") & pl.col("label").is_not_null())
    for row in usable.sort("origin", "position").iter_rows(named=True):
        item = (row["sample_id"], LABELS.index(row["label"]), row["n_tokens"])
        prompts[row["prompt_id"]].append(item)
    expected: dict[str, str] = {}
    for items in prompts.values():
        expected |= oracle(items, settings, 64, len(LABELS), derive_seed(seed, "draw", 3))
    assert dict(pool.rows.filter("drawn").select("sample_id", "reason").rows()) == expected


# Properties

quantile_rules = st.sampled_from([None, QuantileSettings(), QuantileSettings(per="pool")])


@hypothesis_settings(deadline=None)
@given(samples_of_pools, all_settings, quantile_rules, st.randoms())
def test_the_order_of_rows_does_not_matter(drawn, settings, rule, random) -> None:  # type: ignore[no-untyped-def]
    rows = random_table(drawn)
    order = list(range(rows.height))
    random.shuffle(order)
    one = build(rows, settings, current=3, quantiles=rule)
    two = build(rows[order], settings, current=3, quantiles=rule)
    assert one.rows.equals(two.rows) and one.shortfalls.equals(two.shortfalls)


@hypothesis_settings(deadline=None)
@given(samples_of_pools, all_settings, quantile_rules)
def test_invariants(drawn, settings, rule) -> None:  # type: ignore[no-untyped-def]
    rows = random_table(drawn)
    pool = build(rows, settings, current=3, quantiles=rule)
    assert sorted(pool.rows["sample_id"]) == sorted(rows["sample_id"])
    assert pool.rows.schema == DATAPOOL
    assert set(pool.rows["reason"]) <= set(REASONS)
    assert (pool.rows["drawn"] == pool.rows["reason"].is_in(DRAWN_REASONS)).all()
    assert pool.drawn == pool.rows["drawn"].sum()
    states = pool.rows.join(rows.select("sample_id", "status"), on="sample_id")
    assert states.filter("drawn")["status"].is_in(["ok"]).all()
    assert states.filter("drawn")["label"].null_count() == 0
    if pool.wanted is not None:
        assert pool.drawn <= pool.wanted
        quota = dict(zip(LABELS, settings.quotas(LABELS), strict=True))
        group = ["prompt_id", "label"] if settings.per == "prompt" else ["label"]
        within = pool.rows.filter(pl.col("reason").is_in(["quota", "top-up"])).group_by(group).len()
        assert all(row["len"] <= quota[row["label"]] for row in within.iter_rows(named=True))
        assert (pool.shortfalls["wanted"] == pool.shortfalls["obtained"] + pool.shortfalls["short"]).all()
    counted = pool.shortfalls["obtained"].sum() + pool.shortfalls["filled"].sum()
    assert counted == pool.drawn


@hypothesis_settings(deadline=None)
@given(samples_of_pools, st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000))
def test_a_larger_factor_drops_more(drawn, one, two, seed) -> None:  # type: ignore[no-untyped-def]
    rows = random_table(drawn)
    less, more = sorted((one, two))
    few = drop_earlier(rows, less, seed, current=3).sum()
    many = drop_earlier(rows, more, seed, current=3).sum()
    assert few <= many
    current = rows["origin"] == 3
    assert not drop_earlier(rows, more, seed, current=3).filter(current).any()


def test_draws_depend_on_seed_and_iteration_and_are_reproducible() -> None:
    rows = labelled("g" * 50, origin=1)
    settings = PoolSettings(samples_per_bucket=10, drop_factor=0.0)

    def chosen(**more: Any) -> list[bool]:
        return build(rows, settings, labels=["good"], **more).rows["drawn"].to_list()

    assert chosen(seed=1) == chosen(seed=1)
    assert chosen(seed=1) != chosen(seed=2)
    assert chosen(seed=1, current=1) != chosen(seed=1, current=2)


def test_the_draw_is_uniform() -> None:
    rows = labelled("g" * 20)
    hits: Counter[str] = Counter()
    for seed in range(400):
        settings = PoolSettings(samples_per_bucket=5)
        hits.update(build(rows, settings, labels=["good"], seed=seed).rows.filter("drawn")["sample_id"])
    # 400 draws of 5 in 20: 100 hits each, standard deviation 8.7.
    assert len(hits) == 20 and all(60 < count < 140 for count in hits.values())


def test_a_recorded_draw_is_unchanged() -> None:
    """Guards against a silent change of keys, which would change every existing pool."""
    pool = build(labelled("ggggggffffffbbbbbb"), PoolSettings(samples=8), seed=42)
    rows = labelled("ggggggffffffbbbbbb").select("sample_id", "position")
    chosen = pool.rows.filter("drawn").join(rows, on="sample_id")["position"].sort().to_list()
    assert chosen == [0, 1, 2, 4, 6, 10, 13, 17]


def test_ids_that_agree_in_64_bits_stay_distinct() -> None:
    twins = [sample(i, sample_id="0123456789abcdef" + tail) for i, tail in enumerate(("0f", "0a", "0c"))]
    rows = table(twins).drop("position")
    one = build(rows, PoolSettings(samples_per_bucket=2))
    two = build(rows[[2, 0, 1]], PoolSettings(samples_per_bucket=2))
    assert one.rows.equals(two.rows) and one.drawn == 2
