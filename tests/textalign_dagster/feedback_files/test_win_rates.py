"""Win rates under both protocols on a small fixture, worked out by hand."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from textalign_dagster.cli.main import main
from textalign_dagster.feedback_files.alpaca_eval import read_annotations
from textalign_dagster.feedback_files.win_rates import Outcomes, length_controlled, win_rate

# Five instructions. Ratings of the reference: 4, 4, 5, missing, 3.
REFERENCE = [("i1", "ref 1", 4), ("i2", "ref 2", 4), ("i3", "ref 3", 5), ("i5", "ref 5", 3)]
# Model A: 6 > 4, 4 = 4, 2 < 5, i4 without a reference, i5 not parseable, i1 twice (the first counts):
# 1, 1/2, 0 of 3 items; 50 %.
RATED_A = [
    ("i1", "a 1", 6), ("i1", "a 1 again", 1), ("i2", "a 2", 4), ("i3", "a 3", 2), ("i4", "a 4", 7), ("i5", "a 5", "7/7"),
]  # fmt: skip
# Rankings, the reference first: A wins i1, loses i2, ties i3, i4 mixed up, i5 the same text: 1, 0, 1/2, 1/2; 50 %.
RANKED_A = [
    ("i1", "ref 1", "a 1", "(b)"), ("i2", "ref 2", "a 2", "(a)"), ("i3", "ref 3", "a 3", "equal"),
    ("i4", "ref 4", "a 4", "Output"), ("i5", "same", "same", "equal"),
]  # fmt: skip
# Model B: 5 > 4 and 3 < 4: 50 %; by rankings 3 of 3: 100 %.
RATED_B = [("i1", "b 1", 5), ("i2", "b 2", 3)]
RANKED_B = [(f"i{k}", f"ref {k}", f"b {k}", "(b)") for k in (1, 2, 3)]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    paths = {}
    tables = {
        "reference": REFERENCE,
        "rated_a": RATED_A,
        "ranked_a": RANKED_A,
        "rated_b": RATED_B,
        "ranked_b": RANKED_B,
    }
    for name, rows in tables.items():
        path = tmp_path / f"{name}.csv"
        with path.open("w", newline="") as file:  # as the released scripts write them: no header
            csv.writer(file).writerows([row[0], "", *row[1:]] for row in rows)
        paths[name] = str(path)
    return paths


def test_the_matrix_by_hand(files: dict[str, str]) -> None:
    models = [
        f"a={files['rated_a']}",
        f"a={files['ranked_a']}",
        f"b={files['rated_b']}",
        f"b={files['ranked_b']}",
    ]
    result = CliRunner().invoke(main, ["winrates", "--reference", files["reference"], *models, "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    rows = {(row["model"], row["protocol"]): row for row in found["win_rates"]}
    rates = {key: row["win_rate"]["value"] for key, row in rows.items()}
    assert rates == {
        ("a", "ratings"): 0.5,
        ("a", "rankings"): 0.5,
        ("b", "ratings"): 0.5,
        ("b", "rankings"): 1.0,
    }
    a = rows["a", "ratings"]
    assert [a[name] for name in ("wins", "ties", "losses")] == pytest.approx([1 / 3] * 3)
    assert (a["counted"], a["items"], a["unusable"]) == (3, 5, 1)
    ranked = rows["a", "rankings"]
    assert [ranked[name] for name in ("wins", "ties", "losses")] == [0.25, 0.5, 0.25]
    assert (ranked["counted"], ranked["items"], ranked["unusable"]) == (4, 5, 1)
    # By ratings both have i1 (1, 1) and i2 (1/2, 0); by rankings i1 (1, 1), i2 (0, 1) and i3 (1/2, 1). Model a has
    # i1 (1, 1), i2 (1/2, 0) and i3 (0, 1/2) by both, b i1 (1, 1) and i2 (0, 1).
    differences = {(row["first"], row["second"]): (row["value"], row["n"]) for row in found["differences"]}
    assert differences == {
        ("a, by ratings", "a, by rankings"): (pytest.approx(0.0), 3),
        ("a, by ratings", "b, by ratings"): (pytest.approx(0.25), 2),
        ("a, by rankings", "b, by rankings"): (pytest.approx(-0.5), 3),
        ("b, by ratings", "b, by rankings"): (pytest.approx(-0.5), 2),
    }
    shown = CliRunner().invoke(main, ["winrates", "--reference", files["reference"], *models]).stdout
    assert "b, by rankings: 100.0 %" in shown and "3 of 5 items, 1 unusable" in shown
    assert "a, by ratings - b, by ratings: +25.0 points" in shown and ", 2 shared items" in shown


def test_bad_input_is_reported(files: dict[str, str]) -> None:
    def refused(*arguments: str) -> str:
        done = CliRunner().invoke(main, ["winrates", *arguments])
        assert done.exit_code != 0
        return done.output

    assert "expected NAME=FILE" in refused(files["rated_a"])
    assert "give those of the reference as --reference" in refused(f"a={files['rated_a']}")
    twice = [f"a={files['ranked_a']}", f"a={files['ranked_b']}"]
    assert "a already has a file of rankings" in refused(*twice)


def rows(outcomes: list[float], longer: list[float]) -> pl.DataFrame:
    ids = [f"p{i:04d}" for i in range(len(outcomes))]
    return pl.DataFrame({"prompt_id": ids, "outcome": outcomes, "longer_by": longer})


def test_length_controlled_rate_equals_win_rate_at_equal_length() -> None:
    found = length_controlled(rows([1.0, 1.0, 0.5, 0.0, 1.0] * 20, [0.0] * 100), resamples=50)
    assert found.value == pytest.approx(0.7, abs=1e-4)


def test_length_explains_wins_away() -> None:
    """Odds of a win are 1 : 1 at equal length and e^2 times as high at tanh = 1; drawn from exactly this model."""
    rng = np.random.default_rng(0)
    longer = rng.normal(50, 100, 20_000)
    p = 1 / (1 + np.exp(-2 * np.tanh(longer / longer.std())))
    outcomes = (rng.random(20_000) < p).astype(float)
    assert outcomes.mean() > 0.6
    assert length_controlled(rows(outcomes.tolist(), longer.tolist()), resamples=1).value == pytest.approx(
        0.5, abs=0.02
    )


def test_separated_lengths_stay_finite() -> None:
    found = length_controlled(rows([1.0] * 5 + [0.0] * 5, [9.0] * 5 + [-9.0] * 5), resamples=100)
    assert found.value == pytest.approx(0.5, abs=1e-6) and found.lo is not None


def test_detectable_difference() -> None:
    """400 items, half of them won: a standard error of 0.025, and 2.8 times that is 0.07."""
    found = win_rate(Outcomes(rows([1.0, 0.0] * 200, [0.0] * 400), 400, 0), resamples=4000)
    assert found.detectable == pytest.approx(0.025 * 2.8016, rel=0.06)
    empty = win_rate(Outcomes(rows([], []).cast({"outcome": pl.Float64, "longer_by": pl.Float64}), 3, 0))
    assert empty.win_rate.value is None and empty.detectable is None and empty.length_controlled.value is None
    assert not math.isnan(empty.wins or 0.0)


def test_annotations_of_alpaca_eval(tmp_path: Path) -> None:
    def row(instruction: str, preference: float | None) -> dict[str, object]:
        texts = {"instruction": instruction, "output_1": "reference", "output_2": "a model's answer"}
        return {**texts, "generator_1": "text_davinci_003", "generator_2": "mine", "preference": preference}

    # A win, a loss, ties in both encodings, a win with probability 0.9, a repeat (the first counts), an unusable row.
    rows = [row("a", 2), row("b", 1), row("c", 1.5), row("d", 0), row("e", 1.9), row("a", 1), row("f", None)]
    path = tmp_path / "annotations.json"
    path.write_text(json.dumps(rows), encoding="utf-8")
    outcomes = read_annotations(path)
    assert outcomes.rows["outcome"].to_list() == pytest.approx([1, 0, 0.5, 0.5, 0.9])
    assert outcomes.rows["longer_by"].to_list() == [len("a model's answer") - len("reference")] * 5
    assert (outcomes.items, outcomes.unusable) == (6, 1)
    result = CliRunner().invoke(main, ["winrates", f"mine={path}", "--format", "alpaca_eval"])
    assert result.exit_code == 0 and "mine, by rankings: 58.0 %" in result.stdout
    assert "wins 40.0, ties 40.0, losses 20.0" in result.stdout
    path.write_text(json.dumps([{"instruction": "a", "output": "x"}]), encoding="utf-8")
    result = CliRunner().invoke(main, ["winrates", f"mine={path}", "--format", "alpaca_eval"])
    assert result.exit_code == 1 and "row 1 is not an AlpacaEval annotation" in result.output
