"""The score table by hand: what is counted, what is left out, and the titles."""

from __future__ import annotations

import math

import polars as pl
import pytest

from textalign_dagster.experiment import Experiment
from textalign_dagster.reports.score_table import (
    GUARDS,
    PERPLEXITY_MEAN,
    reported,
    score_table,
    titles,
    value_of,
)
from textalign_dagster.settings import merge, validate
from textalign_dagster.tables import SCORES
from textalign_dagster.tasks import Measure


def experiment(**evaluation: object) -> Experiment:
    minimal = {"task": "pep8", "method": {"name": "quark"}, "policy": {"model": "m"}}
    validated: Experiment = validate(Experiment, merge(minimal, {"evaluation": evaluation}), "x")
    return validated


OWN = (
    Measure("violations", "violations per 1,000", "violations", "characters", 1000, "lower"),
    Measure("clean", "clean samples", "clean", better="higher"),
)


MEASURES = (*OWN, *GUARDS)


def samples() -> tuple[pl.DataFrame, pl.DataFrame]:
    frame = pl.DataFrame(
        {
            "sample_id": ["a", "b", "c", "d", "e"],
            "prompt_id": ["p", "p", "q", "q", "p"],
            "condition": ["good"] * 4 + ["bad"],
            "role": ["main"] * 4 + ["probe"],
            "text": ["x y z", "x y z", "x y z", "u v w", "one"],
            "n_tokens": [2, 4, 3, 3, 9],
            "nll": [2.0, 1.0, 3.0, None, None],
            "nll_tokens": [2, 1, 3, None, None],
        }
    )
    measured = pl.DataFrame(
        {
            "sample_id": ["a", "b", "c", "d", "e"],
            "violations": [1.0, 0.0, 2.0, 1.0, 7.0],
            "characters": [100.0, 100.0, 100.0, 100.0, 70.0],
            "clean": [0.0, 1.0, 0.0, None, 0.0],
        }
    )
    return frame, measured


def test_the_score_table_by_hand() -> None:
    frame, measured = samples()
    scores = score_table(frame, measured, MEASURES, policy_hash="h", resamples=100)
    assert scores.schema == SCORES
    assert set(scores["policy_hash"]) == {"h"}
    assert value_of(scores, "violations") == pytest.approx(1000 * 4 / 400)
    assert value_of(scores, "clean") == pytest.approx(1 / 3)  # unmeasured samples do not count as 0
    assert value_of(scores, "n_tokens") == pytest.approx(3.0)
    assert value_of(scores, "perplexity") == pytest.approx(math.exp((2 + 1 + 3) / (2 + 1 + 3)))
    assert value_of(scores, "violations", role="probe") == pytest.approx(100.0)
    assert value_of(scores, "perplexity", role="probe") is None  # probes are not scored: no row, not 0
    assert value_of(scores, "nonsense") is None
    main = {row["metric"]: row for row in scores.filter(role="main").iter_rows(named=True)}
    # Four samples do not fill a block of distinct-3: an undefined metric has no row.
    assert list(main) == ["violations", "clean", *(m.name for m in GUARDS if m.name != "distinct_3")]
    for name in ("violations", "clean", "n_tokens", "perplexity"):
        row = main[name]
        assert row["n"] == 2  # prompts, the resampling unit
        assert row["lo"] <= row["value"] <= row["hi"]
        assert row["condition"] == "good"
    # Two prompts with means 5 and 15: no resampling can leave that range.
    assert 5 <= main["violations"]["lo"] <= main["violations"]["hi"] <= 15


def test_distinct_3_of_blocks_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textalign_dagster.reports.score_table.DISTINCT_BLOCK", 2)
    frame, measured = samples()
    scores = score_table(frame, measured, MEASURES, policy_hash="h", resamples=100)
    # Blocks of two samples of a prompt: (x y z, x y z) has 1 trigram in 6 words, (x y z, u v w) has 2.
    assert value_of(scores, "distinct_3") == pytest.approx((1 / 6 + 2 / 6) / 2)


def test_row_order_does_not_matter() -> None:
    frame, measured = samples()
    one = score_table(frame, measured, MEASURES, policy_hash="h", resamples=100)
    two = score_table(frame, measured.reverse(), MEASURES, policy_hash="h", resamples=100)
    assert one.equals(two)


def test_the_maximum_of_each_prompt() -> None:
    """Average max toxicity and toxicity probability over two prompts."""
    frame = pl.DataFrame(
        {
            "sample_id": list("abcdef"),
            "prompt_id": ["p", "p", "p", "q", "q", "r"],
            "condition": [None] * 6,
            "role": ["main"] * 6,
            "score": [0.1, 0.9, None, 0.4, 0.2, None],
            "any": [0.0, 1.0, None, 0.0, 0.0, None],
            "words": [1.0, 3.0, 1.0, 2.0, 0.0, 5.0],
        },
        schema_overrides={"condition": pl.String},
    )
    measures = (
        Measure("average_max", "", "score", per_prompt="max"),
        Measure("probability", "", "any", per_prompt="max", scale=100),
        Measure("mean", "", "score"),
        Measure("per_word", "", "score", "words", per_prompt="max"),
    )
    table = score_table(frame, frame.select("sample_id"), measures, policy_hash="h", resamples=100)
    by_metric = {row["metric"]: row for row in table.iter_rows(named=True)}
    assert by_metric["average_max"]["value"] == pytest.approx((0.9 + 0.4) / 2)
    assert by_metric["probability"]["value"] == pytest.approx(100 * (1 + 0) / 2)
    assert by_metric["mean"]["value"] == pytest.approx((0.1 + 0.9 + 0.4 + 0.2) / 4)
    assert by_metric["per_word"]["value"] == pytest.approx((0.9 / 3 + 0.4 / 2) / 2)  # not 0 words
    assert {row["n"] for row in by_metric.values()} == {2}  # r has no value: it does not count
    # Two prompts: a resample is one of them twice, or both.
    assert (by_metric["average_max"]["lo"], by_metric["average_max"]["hi"]) == (0.4, 0.9)


def test_a_measure_without_data_is_not_reported() -> None:
    frame, measured = samples()
    empty = measured.with_columns(nothing=pl.lit(None), few=pl.Series([None] * 4 + [1.0], dtype=pl.Float64))
    measures = (Measure("nothing", "", "nothing"), Measure("few", "", "few"))
    table = score_table(frame, empty, measures, policy_hash="h", resamples=100)
    assert table.select("metric", "role").rows() == [("few", "probe")]


def test_the_tasks_columns_take_precedence_over_the_evaluations() -> None:
    frame, measured = samples()
    scored, own = frame.with_columns(score=pl.lit(1.0)), measured.with_columns(score=pl.lit(2.0))
    measures = (Measure("score", "", "score"),)
    assert value_of(score_table(scored, own, measures, policy_hash="h", resamples=100), "score") == 2.0
    assert value_of(score_table(scored, measured, measures, policy_hash="h", resamples=100), "score") == 1.0


def test_a_baselines_rows_carry_its_name() -> None:
    frame, measured = samples()
    table = score_table(frame, measured, OWN, policy_hash="h", resamples=100, subject="sft")
    assert set(table["subject"]) == {"sft"}
    assert score_table(frame, measured, OWN, policy_hash="h", resamples=100)["subject"].null_count() == len(
        table
    )


def test_the_published_perplexity_is_reported_alongside_ours() -> None:
    frame, measured = samples()
    table = score_table(frame, measured, (*GUARDS, PERPLEXITY_MEAN), policy_hash="h", resamples=100)
    # Per sample 2/2, 1/1 and 3/3 nats per token: all equal here; see test_statistics for other values.
    assert value_of(table, "perplexity_mean") == pytest.approx(math.e)
    far = frame.with_columns(nll=pl.Series([2.0, 100.0, 3.0, None, None]))
    table = score_table(far, measured, (*GUARDS, PERPLEXITY_MEAN), policy_hash="h", resamples=100)
    assert value_of(table, "perplexity_mean") == pytest.approx(math.e)  # exp(100) is left out
    assert value_of(table, "perplexity") == pytest.approx(math.exp(105 / 6))


PEP8 = ["violations", "clean", "parse_rate", "characters"]
GUARD_NAMES = ["distinct_3", "perplexity", "n_tokens"]
JUDGE = {"model": "m", "api_key_env": None}


@pytest.mark.parametrize(
    ("evaluation", "extra", "last"),
    [
        ({}, [], []),
        ({"scorer": {"name": "patterns", "keywords": ["x"]}}, ["score"], []),
        ({"judge": {**JUDGE, "template": "win", "ask": "win"}}, ["win_rate", "judge_unusable"], []),
        ({"judge": {**JUDGE, "template": "rating", "ask": "rating"}}, ["judge_score", "judge_unusable"], []),
        ({"fluency_model": "/models/gpt2-xl"}, [], ["perplexity_mean"]),
    ],
)
def test_reported_measures_and_their_order(
    evaluation: dict[str, object], extra: list[str], last: list[str]
) -> None:
    mine = experiment(**evaluation)
    assert [measure.name for measure in reported(mine)] == [*PEP8, *extra, *GUARD_NAMES, *last]
    assert list(titles(mine)) == [*PEP8, *extra, *GUARD_NAMES, *last, "obedience"]


def test_titles_name_scorer_and_fluency_model() -> None:
    default = titles(experiment())
    assert default["perplexity"] == "perplexity under the base policy"
    custom = titles(experiment(fluency_model="owner/gpt2-xl", scorer={"name": "patterns", "keywords": ["x"]}))
    assert (custom["perplexity"], custom["score"]) == ("perplexity under gpt2-xl", "patterns score")


def test_the_scorer_determines_whether_higher_scores_are_better() -> None:
    bad, good = (experiment(scorer={"name": "patterns", "keywords": ["x"], "good": g}) for g in (False, True))
    better = [{m.name: m.better for m in reported(mine)}["score"] for mine in (bad, good)]
    assert better == ["lower", "higher"]
