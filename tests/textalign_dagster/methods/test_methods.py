"""Methods: labels, conditions, exemplars and special tokens, checked by hand."""

from __future__ import annotations

from typing import get_args

import polars as pl
import pytest
from pydantic import ValidationError

from textalign_dagster.methods import (
    AWR,
    CSFT,
    CUT,
    DPO,
    GRPO,
    KTO,
    MLE,
    RWR,
    SFT,
    AltLMC,
    AltLMU,
    AltRM,
    AnyMethod,
    ConditionalTraining,
    Filtering,
    ForwardPrediction,
    Method,
    NoFeedback,
    Quark,
    RankingRewardModel,
    RatedPairsRewardModel,
    RatingRewardModel,
    SteerLM,
    Unlikelihood,
)
from textalign_dagster.methods.base import VARIED, Unconditional
from textalign_dagster.pool.conditioning import render

ROWS = pl.DataFrame(
    {
        "sample_id": list("abcdefgh"),
        "prompt_id": ["p"] * 8,
        "value": [3.0, 0.0, 2.9, 4.0, -1.0, None, 3.0, None],
        "text": ["no issues", "E1", "E2", "beyond", "below", None, "judge failed", ""],
        "label": ["Harmful", "harmful", None, "Harmless and helpful", "", None, "Harmful", "Harmful."],
        "status": ["ok", "ok", "ok", "ok", "ok", "failed", "unparseable", "ok"],
    }
)
METHODS: list[Method] = [
    AltLMU(ask_for="no issues", probe=("E1", "E2")),
    AltLMC(),
    AltRM(),
    Quark(),
    SteerLM(),
    NoFeedback(),
    DPO(),
    Unlikelihood(),
    CUT(),
    AWR(),
    MLE(),
    ForwardPrediction(),
    GRPO(),
    SFT(),
    Filtering(),
    RWR(),
    ConditionalTraining(),
    KTO(),
    CSFT(),
    RatingRewardModel(),
    RankingRewardModel(),
    RatedPairsRewardModel(),
]


def test_every_method_is_in_this_file() -> None:
    union = get_args(AnyMethod)[0]
    assert {type(method) for method in METHODS} == set(get_args(union))
    assert len({method.name for method in METHODS}) == len(METHODS)


def test_alt_lmu_labels_by_score_and_conditions_on_words() -> None:
    labelled = METHODS[0].label(ROWS)
    assert labelled["label"].to_list() == ["3", "0", "2", None, None, None, None, None]
    assert labelled["condition"].to_list() == ["no issues", "E1", "E2", None, None, None, None, None]
    assert labelled.schema["label"] == labelled.schema["condition"] == pl.String


def test_alt_lmu_uses_the_configured_scores() -> None:
    method = AltLMU(ask_for="x", scores=(4, 0, -1))
    assert method.buckets == ("4", "0", "-1")
    assert method.label(ROWS)["label"].to_list() == [None, "0", None, "4", "-1", None, None, None]


def test_alt_lmu_asks_for_an_exemplar_and_probes_others() -> None:
    method = METHODS[0]
    assert (method.exemplar, method.probes, method.wants) == ("no issues", ("E1", "E2"), "text")
    assert method.special_tokens == ()
    assert method.ranking is None
    assert render(method.template, "no issues", "P") == "feedback: no issues input: P"


def test_alt_lmc_conditions_on_its_own_categories_only() -> None:
    method = AltLMC()
    rows = method.label(ROWS)
    assert rows["label"].to_list() == ["Harmful", None, None, "Harmless and helpful", None, None, None, None]
    assert rows["condition"].to_list() == rows["label"].to_list()
    assert (method.exemplar, method.wants) == ("Harmless and very helpful", "category")
    assert method.probes == method.buckets[1:]
    assert render(method.template, "Harmful", "P") == "Harmful.\n\nP"
    with pytest.raises(ValidationError, match="a category is listed twice"):
        AltLMC(categories=("a", "a"))


def test_quark_has_one_token_per_quantile() -> None:
    method = Quark(count=3)
    tokens = ("_QUANTILE_TOKEN_0_", "_QUANTILE_TOKEN_1_", "_QUANTILE_TOKEN_2_")
    assert method.buckets == method.special_tokens == tokens
    assert (method.exemplar, method.probes, method.wants) == (tokens[0], tokens[1:], "reward")
    assert method.ranking == method.quantiles
    assert render(method.template, tokens[0], "P") == "_QUANTILE_TOKEN_0_P"


def test_alt_rm_has_one_phrase_per_quantile() -> None:
    method = AltRM(phrases=("good", "bad"))
    assert method.buckets == ("good", "bad")
    assert (method.exemplar, method.probes, method.wants) == ("good", ("bad",), "reward")
    assert method.special_tokens == ()
    assert render(method.template, "good", "P") == "good input: P"


def test_no_feedback_treats_all_samples_alike() -> None:
    method = NoFeedback()
    assert (method.wants, method.exemplar, method.probes, method.ranking) == (None, None, (), None)
    labelled = method.label(ROWS)
    assert set(labelled["label"]) == {"own sample"} == set(method.buckets)
    assert labelled["condition"].null_count() == ROWS.height
    assert labelled.schema["condition"] == pl.String


CLOSED = [AltLMC(), AltRM(), Quark()]


@pytest.mark.parametrize("method", CLOSED, ids=lambda method: method.name)
def test_exemplars_of_methods_with_one_condition_per_bucket(method: Method) -> None:
    kind = type(method)
    assert method == kind.model_validate({"exemplar": "best"})
    assert method.exemplar == method.buckets[0]
    assert method.sweep == method.buckets
    none = kind.model_validate({"exemplar": "none"})
    assert (none.exemplar, none.sweep) == (None, ())
    worst = kind.model_validate({"exemplar": "static", "ask_for": method.buckets[-1]})
    assert worst.exemplar == method.buckets[-1]
    assert worst.probes == method.buckets[:-1]
    assert worst.sweep == method.buckets  # best first, whichever is asked for
    with pytest.raises(ValidationError, match=r"every sample in the best bucket of .* use `exemplar: best`"):
        kind.model_validate({"exemplar": "varied"})
    with pytest.raises(ValidationError, match=r"'superb' is not a condition of .*; one of: "):
        kind.model_validate({"exemplar": "static", "ask_for": "superb"})
    with pytest.raises(ValidationError, match=r"ask_for\n +Field required"):
        kind.model_validate({"exemplar": "static"})


def test_exemplars_of_alt_lmu() -> None:
    static = AltLMU(ask_for="good", probe=("fair", "bad"))
    assert static == AltLMU.model_validate(
        {"exemplar": "static", "ask_for": "good", "probe": ["fair", "bad"]}
    )
    assert static.sweep == ("good", "fair", "bad")
    varied = AltLMU.model_validate({"exemplar": "varied", "probe": ["fair"]})
    assert (varied.exemplar, varied.sweep) == (VARIED, (VARIED, "fair"))
    none = AltLMU.model_validate({"exemplar": "none", "ask_for": "good"})
    assert (none.exemplar, none.sweep) == (None, ())
    for given, message in (
        ({"exemplar": "best"}, "use `static` .* or `varied`"),
        ({}, "ask_for\n +Field required"),
        ({"ask_for": "  "}, "blank, which is no condition"),
        ({"exemplar": "all", "ask_for": "x"}, "'none', 'best', 'static' or 'varied'"),
        ({"exemplar": "none", "exemplar_policy": "none"}, "the same setting; remove one of them"),
    ):
        with pytest.raises(ValidationError, match=message):
            AltLMU.model_validate(given)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_method_round_trips_through_its_settings(method: Method) -> None:
    assert type(method).model_validate(method.model_dump()) == method


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_invariants_of_every_method(method: Method) -> None:
    assert len(set(method.buckets)) == len(method.buckets) > 0
    assert all(isinstance(bucket, str) and bucket for bucket in method.buckets)
    assert method.exemplar not in method.probes
    assert (method.exemplar is None) == isinstance(method, Unconditional)
    assert set(method.special_tokens) <= set(method.buckets)
    assert method.sweep == (() if method.exemplar is None else (method.exemplar, *method.probes))
    assert type(method).__doc__
    if method.ranking is None:
        empty = method.label(ROWS.head(0))
        assert empty.is_empty()
        assert {"label", "condition"} <= set(empty.columns)
    else:
        with pytest.raises(NotImplementedError):
            method.label(ROWS)


def test_rated_pairs_always_come_from_ratings() -> None:
    assert RatedPairsRewardModel().objectives == ("bradley_terry",)
    with pytest.raises(ValidationError, match="pairs_from"):
        RatedPairsRewardModel(pairs_from="comparisons")  # type: ignore[arg-type]
