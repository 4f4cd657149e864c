"""Examples from drawn rows, by hand; and the seven settings of Alignment_with_Huggingface as a view of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from resources.store import ArtifactStore
from resources.views import connect
from textalign_dagster.methods import DPO, AltLMU, NoFeedback, Unlikelihood
from textalign_dagster.methods.reward_models import RankingRewardModel
from textalign_dagster.pool.examples import compared, groups, pairs, single
from textalign_dagster.tables import EXAMPLES, SPAN


def rows(*given: dict[str, Any]) -> pl.DataFrame:
    """Drawn rows; columns that are not given have default values."""
    defaults = {
        "pool_hash": "pool",
        "prompt_id": "p",
        "value": None,
        "label": "sample",
        "condition": None,
        "weight": 1.0,
        "n_tokens": 3,
        "prompt": "def f():",
        "finish_reason": "stop",
        "logprob": -2.0,
        "spans": None,
    }
    schema = {
        "pool_hash": pl.String,
        "prompt_id": pl.String,
        "value": pl.Float64,
        "label": pl.String,
        "condition": pl.String,
        "weight": pl.Float64,
        "n_tokens": pl.Int32,
        "prompt": pl.String,
        "finish_reason": pl.String,
        "logprob": pl.Float64,
        "spans": pl.List(SPAN),
        "sample_id": pl.String,
        "text": pl.String,
    }
    return pl.DataFrame(
        [{**defaults, "text": f" text {row['sample_id']}", **row} for row in given], schema=schema
    )


VALUES = [
    ("a", "p", 1.0),
    ("b", "p", 3.0),
    ("c", "p", 2.0),
    ("d", "p", 0.0),
    ("e", "q", 5.0),
    ("f", "q", 5.0),
]
SIX = rows(*({"sample_id": s, "prompt_id": p, "value": v} for s, p, v in VALUES))


def roles_and_ids(examples: pl.DataFrame) -> list[tuple[str, str]]:
    return list(examples.select("role", "sample_id").iter_rows())


def test_one_pair_per_prompt() -> None:
    examples = pairs(SIX)
    assert examples.schema == EXAMPLES
    # Prompt q has equal rewards and no pair.
    assert roles_and_ids(examples) == [("chosen", "b"), ("rejected", "d")]
    assert examples["group_id"].n_unique() == 1 and examples["reward"].to_list() == [3.0, 0.0]


def test_further_pairs_and_the_margin() -> None:
    assert roles_and_ids(pairs(SIX, per_prompt=9)) == [
        *[("chosen", "b"), ("rejected", "d")],
        *[("chosen", "c"), ("rejected", "a")],
    ]
    assert roles_and_ids(pairs(SIX, per_prompt=9, margin=1.0)) == [("chosen", "b"), ("rejected", "d")]
    assert roles_and_ids(pairs(SIX, margin=3.0)) == []


def test_rows_that_form_no_pair() -> None:
    alone = rows({"sample_id": "a", "value": 1.0}, {"sample_id": "b", "value": None})
    assert pairs(alone).is_empty() and pairs(alone).schema == EXAMPLES
    same = rows(
        {"sample_id": "a", "value": 1.0, "text": " x"}, {"sample_id": "b", "value": 0.0, "text": " x"}
    )
    assert pairs(same).is_empty()


def test_a_pairs_weight_is_the_product() -> None:
    two = rows(
        {"sample_id": "a", "value": 1.0, "weight": 2.0}, {"sample_id": "b", "value": 0.0, "weight": 3.0}
    )
    assert pairs(two)["weight"].to_list() == [6.0, 6.0]


def test_pairs_do_not_depend_on_the_order_of_rows() -> None:
    assert pairs(SIX.reverse(), per_prompt=2).equals(pairs(SIX, per_prompt=2))


def test_example_ids_are_unique() -> None:
    examples = pl.concat([single(SIX), groups(SIX), pairs(SIX, per_prompt=2)])
    assert examples["example_id"].n_unique() == examples.height
    assert single(SIX)["example_id"].to_list() == single(SIX)["example_id"].to_list()


def test_single_rows_keep_order_condition_and_spans() -> None:
    marked = [{"start": 0, "end": 2, "score": 1.0}]
    given = rows({"sample_id": "b", "condition": "good", "spans": marked}, {"sample_id": "a"})
    examples = single(given)
    assert examples["sample_id"].to_list() == ["b", "a"] and examples["condition"].to_list() == ["good", None]
    assert examples["spans"].to_list() == [marked, None]
    assert set(examples["role"]) == {"only"} and examples["group_id"].null_count() == 2


def test_pairs_from_comparisons() -> None:
    given = rows(
        {"sample_id": "a", "value": 1.0, "weight": 2.0},
        {"sample_id": "b", "value": 0.0, "weight": 3.0},
        {"sample_id": "c", "value": 0.5, "text": " text a"},  # the same text as a's
        {"sample_id": "d", "value": 0.5},
    )
    # a beat b, c and one that was not drawn; d beat b, and b beat d: contradictions stay.
    beaten = {"a": ["b", "c", "gone"], "b": ["d"], "c": [], "d": ["b"]}
    with_comparisons = given.with_columns(beaten=pl.Series([beaten[i] for i in given["sample_id"]]))
    examples = compared(with_comparisons)
    assert roles_and_ids(examples) == [
        ("chosen", "a"), ("rejected", "b"), ("chosen", "b"), ("rejected", "d"), ("chosen", "d"), ("rejected", "b"),
    ]  # fmt: skip
    assert examples["weight"].to_list() == [6.0, 6.0, 3.0, 3.0, 3.0, 3.0]
    assert examples["group_id"].n_unique() == 3 and examples["example_id"].is_unique().all()
    assert compared(with_comparisons.sample(fraction=1.0, shuffle=True, seed=1)).equals(examples)
    for method in (DPO(pairs_from="comparisons"), RankingRewardModel(pairs_from="comparisons")):
        assert method.examples(with_comparisons).equals(examples)


def test_groups_are_per_prompt() -> None:
    examples = groups(SIX)
    assert examples["group_id"].to_list() == [*"pppp", *"qq"] and set(examples["role"]) == {"member"}


@pytest.mark.parametrize("method", [AltLMU(ask_for="x"), NoFeedback(), Unlikelihood()])
def test_most_methods_train_on_single_rows(method: Any) -> None:
    assert roles_and_ids(method.examples(SIX)) == [("only", s) for s, _, _ in VALUES]


def test_dpo_trains_on_pairs() -> None:
    assert roles_and_ids(DPO(pairs_per_prompt=2, margin=1.5).examples(SIX)) == [
        ("chosen", "b"),
        ("rejected", "d"),
    ]


# --- Alignment_with_Huggingface: contents of a batch in each of its settings ---------------------------

UNJUDGED = rows({"sample_id": "a"}, {"sample_id": "b"})
JUDGED = rows({"sample_id": "a", "value": 1.0}, {"sample_id": "b", "value": 0.0})
RANKED = pairs(JUDGED)
NO_REWARD = RANKED.with_columns(reward=pl.lit(None, dtype=pl.Float64))
GENERATION_2 = ("generation2", "generation2_response_only", "generation2_reward", "generation2_weight")
SETTINGS: dict[str, tuple[pl.DataFrame, list[tuple[float | None, float | None, bool]]]] = {
    # examples; per row of the batch: rewards of both generations, whether there is a second one
    "SFT": (single(UNJUDGED), [(None, None, False), (None, None, False)]),
    "reward modelling": (NO_REWARD, [(None, None, True)]),
    "RL": (groups(JUDGED), [(1.0, None, False), (0.0, None, False)]),
    "offline pointwise": (single(JUDGED), [(1.0, None, False), (0.0, None, False)]),
    "online pointwise": (single(JUDGED), [(1.0, None, False), (0.0, None, False)]),
    "offline pairwise": (RANKED, [(1.0, 0.0, True)]),
    "online pairwise": (RANKED, [(1.0, 0.0, True)]),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_batches_of_alignment_with_huggingface(setting: str, tmp_path: Path) -> None:
    examples, expected = SETTINGS[setting]
    store = ArtifactStore(tmp_path / "store")
    pool = store.make(
        "datapool", "k", lambda draft: draft.write("examples", examples, EXAMPLES), inputs={}, settings={}
    )
    store.assign("e", 1, "datapool", pool, settings={}, checks={})
    with connect(store) as connection:
        batch = pl.from_arrow(connection.sql("FROM preference_batches ORDER BY generation1").to_arrow_table())
        assert isinstance(batch, pl.DataFrame)
    assert list(batch.select("generation1_reward", "generation2_reward").iter_rows()) == [
        (first, second) for first, second, _ in expected
    ]
    assert batch["generation1"].to_list()[0] == "def f(): text a"
    assert batch["generation1_response_only"].to_list()[0] == " text a"
    assert set(batch["generation1_weight"]) == {1.0} and set(batch["prompt"]) == {"def f():"}
    for (_, _, paired), row in zip(expected, batch.iter_rows(named=True), strict=True):
        if paired:
            assert row["generation2"] == "def f(): text b" and row["generation2_weight"] == 1.0
        else:
            assert all(row[column] is None for column in GENERATION_2)
