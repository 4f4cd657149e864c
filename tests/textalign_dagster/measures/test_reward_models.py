"""Agreement of a reward model with feedback, computed by hand."""

from __future__ import annotations

import math

import polars as pl
import pytest

from textalign_dagster.measures.reward_models import (
    calibration_error,
    decided_pairs,
    judge_consistency,
    longer_preferred,
    order_consistency,
    pair_accuracy,
    reward_model_scores,
)

# Prompt p: values 3 > 1 = 1, rewards 0.5, 0.5, 2. Two decided pairs: one with equal rewards, one wrong.
# Prompt q: 2 > 0, rewards 1 > -1: right. One text without a reward, one without a value, one alone.
SAMPLES = pl.DataFrame(
    [
        ("a", "p", "long text", 3.0, 0.5),
        ("b", "p", "text", 1.0, 0.5),
        ("c", "p", "longer text", 1.0, 2.0),
        ("d", "q", "yes", 2.0, 1.0),
        ("e", "q", "no!", 0.0, -1.0),
        ("f", "q", "none", 5.0, None),
        ("g", "q", "none", None, 1.0),
        ("h", "r", "alone", 1.0, 1.0),
    ],
    schema=["sample_id", "prompt_id", "text", "value", "reward"],
    orient="row",
)


def test_pairs_and_accuracy() -> None:
    pairs = decided_pairs(SAMPLES)
    assert sorted(pairs.select("prompt_id", "margin", "longer").rows()) == [
        ("p", -1.5, False),
        ("p", 0.0, True),
        ("q", 2.0, None),  # equally long
    ]
    result = pair_accuracy(pairs, resamples=200)
    assert result.value == pytest.approx((0.5 + 0 + 1) / 3) and (result.n, result.rows) == (2, 3)


def test_longer_preferred() -> None:
    """(a, b): the model ties, feedback prefers the longer text. (a, c): the longer one, and the shorter one."""
    result = longer_preferred(decided_pairs(SAMPLES), resamples=200)
    assert result.value == pytest.approx(((0.5 - 1) + (1 - 0)) / 2)


def test_judge_consistency_across_repeats() -> None:
    """Prompt p: 3 > 1, then 2 > 1: consistent both ways. Prompt q: 1 > 0, then a tie: a half, one way only."""
    rounds = pl.DataFrame(
        [
            ("a", "p", "x", 0, 3.0), ("b", "p", "y", 0, 1.0), ("c", "q", "x", 0, 1.0), ("d", "q", "y", 0, 0.0),
            ("a", "p", "x", 1, 2.0), ("b", "p", "y", 1, 1.0), ("c", "q", "x", 1, 5.0), ("d", "q", "y", 1, 5.0),
        ],
        schema=["sample_id", "prompt_id", "text", "repeat", "value"], orient="row",
    )  # fmt: skip
    result = judge_consistency(rounds, resamples=50)
    assert result.value == pytest.approx((1 + 0.5 + 1) / 3) and (result.n, result.rows) == (2, 3)
    third = rounds.filter(repeat=0).with_columns(repeat=pl.lit(2, pl.Int64), value=-pl.col("value"))
    three = judge_consistency(pl.concat([rounds, third]), resamples=50)
    # Rounds 0 and 2 are opposite: four pairs, all wrong. Rounds 1 and 2: p wrong twice, q a half once.
    assert three.value == pytest.approx((2.5 + 0 + 0.5) / (3 + 4 + 3))


def test_judge_consistency_across_presentation_orders() -> None:
    rows = [("p", "a", None, "ok"), ("p", "tie", "first", "ok"), ("p", "tie", None, "ok"), ("q", None, None, "failed"),
            ("q", "b", None, "ok")]  # fmt: skip
    pairs = pl.DataFrame(rows, schema=["prompt_id", "winner", "favoured", "status"], orient="row")
    result = order_consistency(pairs, resamples=50)
    assert result.value == pytest.approx(2 / 3) and result.rows == 3
    scores = dict(reward_model_scores(SAMPLES, 50, comparisons=pairs))
    assert scores["judge_consistency"].value == result.value
    assert "judge_consistency" not in dict(reward_model_scores(SAMPLES, 50))


def test_calibration() -> None:
    """All four pairs predict σ(log 3) = 3/4, and 3/4 of them are right."""
    margins = [math.log(3)] * 3 + [-math.log(3)]
    assert calibration_error(pl.DataFrame({"margin": margins})) == pytest.approx(0.0, abs=1e-12)
    assert calibration_error(pl.DataFrame({"margin": [math.log(3)] * 4})) == pytest.approx(0.25)
    assert calibration_error(pl.DataFrame({"margin": [0.0, 0.0]})) == pytest.approx(0.0)
    assert calibration_error(pl.DataFrame({"margin": []}, {"margin": pl.Float64})) is None
    assert calibration_error(pl.DataFrame({"margin": [-5000.0, 5000.0]})) == pytest.approx(0.5)


def test_undefined_metrics_are_left_out() -> None:
    assert reward_model_scores(SAMPLES.filter(prompt_id="r"), 100) == []
    assert [name for name, _ in reward_model_scores(SAMPLES, 100)] == [
        "pair_accuracy", "rank_correlation", "calibration_error", "longer_preferred",
    ]  # fmt: skip
