"""CUT's rows: which judgments find fault, and which rows are trained on."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from tests.textalign_dagster.pool.test_examples import rows
from textalign_dagster.experiment.experiment import Experiment
from textalign_dagster.experiment.files import Library
from textalign_dagster.methods import CUT, ForwardPrediction
from textalign_dagster.settings import SettingsError

JUDGMENTS = [
    ("Perfect.", "satisfied"),
    ("perfect", "satisfied"),
    ("  **Perfect!**", "satisfied"),
    ("The response is perfect, but long.", "judged"),
    ("Perfectly formatted, but wrong.", "judged"),
    ("E225 missing whitespace", "judged"),
    ("", None),
    (" \n", None),
    (None, None),
]


def labelled(method: CUT, judgments: list[str | None], values: list[float | None]) -> pl.DataFrame:
    given = pl.DataFrame(
        {
            "value": values,
            "label": [None] * len(values),
            "text": judgments,
            "status": ["ok"] * len(judgments),
        },
        schema={"value": pl.Float64, "label": pl.String, "text": pl.String, "status": pl.String},
    )
    return method.label(given)


def test_judgments_that_find_no_fault() -> None:
    texts = [text for text, _ in JUDGMENTS]
    result = labelled(CUT(), texts, [None] * len(texts))
    assert result["label"].to_list() == [label for _, label in JUDGMENTS]
    judged = result["label"] == "judged"
    assert result["condition"].to_list() == [
        text if fault else None for text, fault in zip(texts, judged.fill_null(False), strict=True)
    ]


def test_a_high_score_counts_as_satisfied() -> None:
    texts: list[str | None] = ["too long", "too long", "too long", "fine"]
    result = labelled(CUT(satisfied_score=7, satisfied=("fine",)), texts, [7.0, 6.9, None, None])
    assert result["label"].to_list() == ["satisfied", "judged", "judged", "satisfied"]


def test_failed_judgments_are_not_trained_on() -> None:
    given = labelled(CUT(), ["wrong", "wrong"], [1.0, 1.0])
    failed = CUT().label(given.with_columns(status=pl.lit("failed"), label=pl.lit("flawed")))
    assert failed["label"].to_list() == failed["condition"].to_list() == [None, None]


def test_a_judges_label_alone_is_enough() -> None:
    given = labelled(CUT(), [None, "too long", None], [None] * 3)
    result = CUT().label(given.with_columns(label=pl.Series(["perfect", "flawed", "flawed"])))
    assert result["label"].to_list() == ["satisfied", "judged", None]


@pytest.mark.parametrize(("share", "satisfied"), [(0.0, 0), (0.25, 2), (0.4, 3), (None, 6)])
def test_satisfied_samples_per_judged_sample(share: float | None, satisfied: int) -> None:
    conditions = ["E225"] * 8 + [None] * 6
    drawn = rows(*({"sample_id": f"s{i}", "condition": condition} for i, condition in enumerate(conditions)))
    examples = CUT(satisfied_per_judged=share).examples(drawn)
    judged = examples.filter(pl.col("condition").is_not_null())
    assert judged.height == 8 and examples.height == 8 + satisfied
    assert judged["second_prompt"].to_list() == judged["prompt"].to_list()
    assert examples.filter(pl.col("condition").is_null())["second_prompt"].null_count() == satisfied
    again = CUT(satisfied_per_judged=share).examples(drawn.sample(fraction=1.0, shuffle=True, seed=1))
    assert set(again["example_id"]) == set(examples["example_id"])


def test_forward_prediction_learns_the_judgment_after_the_sample() -> None:
    drawn = rows(
        {"sample_id": "s0", "prompt": "def f():", "text": " x=1\n", "condition": "E225"},
        {"sample_id": "s1", "prompt": "def g():", "text": " x = 1\n", "condition": None},
    )
    method = ForwardPrediction(question="# lint: ", satisfied_per_judged=None)
    examples = method.examples(drawn)
    assert examples.select("prompt", "text", "condition", "second_prompt", "finish_reason").rows() == [
        ("def f(): x=1\n# lint: ", "E225", None, None, "stop"),
        ("def g(): x = 1\n# lint: ", "perfect", None, None, "stop"),
    ]
    assert ForwardPrediction(satisfied_per_judged=0.0).examples(drawn).height == 1


def test_cut_accepts_judgments_but_not_ratings(tmp_path: Path) -> None:
    def load(ask: str) -> Experiment:
        judge = f"{{ask: {ask}, template: {ask}, model: m, base_url: 'http://127.0.0.1:1/v1'}}"
        (tmp_path / "mine.yaml").write_text(
            f"task: pep8\npolicy: {{model: pep8-sloppy-1m}}\nmethod: cut\njudge: {judge}\n"
        )
        return Library((tmp_path,)).load("mine")

    experiment = load("judgment")
    assert experiment.method.wants == "judgment" and experiment.training.objective.name == "cut"
    with pytest.raises(
        SettingsError, match="needs feedback of kind 'judgment', which a judge asked for 'rating'"
    ):
        load("rating")
