"""Feedback collected elsewhere: every format is read, rows are matched to samples, missing files are reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from resources.rewards.scoring import ScoringError, score_samples
from textalign_dagster.feedback_files.formats import write_feedback
from textalign_dagster.scorers import ImportedScorer
from textalign_dagster.settings import SettingsError, validate
from textalign_dagster.tables import FEEDBACK

SAMPLES = pl.DataFrame(
    {
        "sample_id": ["s0", "s1", "s2", "s3"],
        "prompt": ["Name a fruit.", "Name a fruit.", "Name a tree.", "Name a tree."],
        "reference": pl.Series([None] * 4, dtype=pl.String),
        "text": [" An apple.", " A stone.", " An oak.", " An oak."],
        "finish_reason": ["stop"] * 4,
    }
)


def run(scorer: ImportedScorer, iteration: int | None = 1, samples: pl.DataFrame = SAMPLES) -> pl.DataFrame:
    return score_samples(scorer, samples, lambda *_: None, iteration=iteration)


def plain(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def feedback(kind: str, **columns: list[Any]) -> pl.DataFrame:
    size = len(next(iter(columns.values())))
    given = {"sample_id": SAMPLES["sample_id"].to_list()[:size], **columns}
    empty: dict[str, list[Any]] = {name: [None] * size for name in FEEDBACK}
    fixed = {
        "aspect": ["human"] * size, "kind": [kind] * size, "status": ["ok"] * size, "call_keys": [[]] * size,
        "scorer": ["people"] * size,
    }  # fmt: skip
    return pl.DataFrame({**empty, **fixed, **given}, FEEDBACK)


def test_rows_match_by_id_then_by_prompt_and_text(tmp_path: Path) -> None:
    path = plain(
        tmp_path / "ratings.jsonl",
        [
            {"sample_id": "s1", "prompt": "Name a fruit.", "response": " A stone.", "value": 1},
            {"prompt": "Name a fruit. ", "response": "An apple.", "value": 5},
            {"prompt": "Name a tree.", "response": "A car.", "value": 2},
        ],
    )
    rows = run(ImportedScorer(path=str(path)))
    assert rows["sample_id"].to_list() == SAMPLES["sample_id"].to_list()
    assert rows["value"].to_list() == rows["score"].to_list() == [5, 1, None, None]
    assert rows["status"].to_list() == ["ok", "ok", "skipped", "skipped"]
    assert rows["reason"].to_list() == [None, None, *["no judgement in the file"] * 2]


def test_an_id_takes_precedence_over_equal_text(tmp_path: Path) -> None:
    rows = [
        {"sample_id": "s3", "prompt": "Name a tree.", "response": " An oak.", "value": 3},
        {"sample_id": "s2", "prompt": "Name a tree.", "response": " An oak.", "value": 2},
    ]
    result = run(ImportedScorer(path=str(plain(tmp_path / "a.jsonl", rows))))
    assert result["value"].to_list() == [None, None, 2, 3]


def test_repeats_match_repeats_in_order(tmp_path: Path) -> None:
    record = {"prompt": "Name a tree.", "generations": [" An oak.", " An oak."], "rewards": [0.5, 0.7]}
    path = plain(tmp_path / "alt.jsonl", [record])
    three = pl.concat([SAMPLES[2:], SAMPLES[3:].with_columns(sample_id=pl.lit("s4"))])
    result = run(ImportedScorer(path=str(path), format="alt"), samples=three)
    assert result["value"].to_list() == [0.5, 0.7, 0.7]


@pytest.mark.parametrize("format_name", ["plain", "alt"])
@pytest.mark.parametrize("kind", ["reward", "text", "category"])
def test_exported_feedback_can_be_imported(tmp_path: Path, kind: Any, format_name: Any) -> None:
    columns: dict[str, Any] = {
        "reward": {"value": [0.5, -1.0, None]},
        "text": {"value": [3.0, 0.0, None], "text": ["Juicy.", "Hard.", None]},
        "category": {"label": ["Harmful", "Harmless and helpful", None]},
    }[kind]
    given = feedback(kind, **columns, status=["ok", "ok", "unparseable"], reason=[None, None, "no score"])
    path = tmp_path / "feedback.jsonl"
    write_feedback(path, format_name, SAMPLES, given)
    rows = run(ImportedScorer(path=str(path), format=format_name, kind=kind))
    for name in ("value", "label", "text"):
        assert rows[name][:2].to_list() == given[name][:2].to_list()
    # s3 has the same text as s2, so it gets the same judgement.
    assert rows["status"].to_list() == ["ok", "ok", "unparseable", "unparseable"]
    assert rows["reason"][2:].to_list() == ["no score"] * 2
    assert rows["value"][2:].null_count() == 2


def test_ratings_and_judgments_of_other_projects(tmp_path: Path) -> None:
    ratings = tmp_path / "ratings.csv"
    ratings.write_text("Name a fruit.,, An apple.,7\nName a fruit.,, A stone.,9\n")
    rows = run(ImportedScorer(path=str(ratings), format="sparse_ratings"))
    assert rows["value"].to_list() == [7, None, None, None]
    assert rows["status"].to_list() == ["ok", "unparseable", "skipped", "skipped"]
    cut = tmp_path / "cut.json"
    records = [
        {"instruction": "Name a fruit.", "input": "", "output": " An apple.", "judgment": None},
        {
            "instruction": "Name a fruit.",
            "input": "",
            "output": " A stone.",
            "judgment": "A stone is not a fruit.",
        },
    ]
    cut.write_text(json.dumps(records))
    labels = run(ImportedScorer(path=str(cut), format="cut", kind="category"))
    assert labels["label"].to_list()[:2] == ["perfect", "flawed"]
    words = run(ImportedScorer(path=str(cut), format="cut", kind="judgment"))
    assert words.select("label", "text").rows()[:2] == [
        ("perfect", None),
        ("flawed", "A stone is not a fruit."),
    ]
    assert words["status"].to_list() == ["ok", "ok", "skipped", "skipped"]
    numbers = run(ImportedScorer(path=str(cut), format="cut", kind="reward"))
    assert numbers["status"].to_list() == ["skipped"] * 4
    assert numbers["reason"][0] == "its judgement in the file has no number"


def test_the_error_for_a_missing_file_names_the_remedy(tmp_path: Path) -> None:
    scorer = ImportedScorer(path=str(tmp_path / "ratings_{iteration}.jsonl"))
    with pytest.raises(ScoringError) as error:
        run(scorer, 2)
    message = str(error.value)
    assert "ratings_2.jsonl does not exist yet" in message and "textalign export EXPERIMENT" in message
    assert "-k 2" in message and "continues from here" in message
    with pytest.raises(ScoringError, match="needs an iteration"):
        run(scorer, None)


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    good = {"prompt": "Name a fruit.", "response": " An apple.", "value": 5}
    path = plain(tmp_path / "a.jsonl", [good, {"prompt": "Name a tree."}])
    with pytest.raises(ScoringError, match=r"1 of 2 rows cannot be read(.|\n)*line 2"):
        run(ImportedScorer(path=str(path)))
    assert run(ImportedScorer(path=str(path), skip_refused=True))["value"][0] == 5
    other = plain(tmp_path / "b.jsonl", [{**good, "prompt": "Another prompt."}])
    with pytest.raises(ScoringError, match="judges none of the 4 samples"):
        run(ImportedScorer(path=str(other)))
    aspects = plain(
        tmp_path / "c.jsonl", [{**good, "aspect": "taste"}, {**good, "aspect": "style", "value": 1}]
    )
    with pytest.raises(ScoringError, match="aspects style, taste; choose one with `aspect`"):
        run(ImportedScorer(path=str(aspects)))
    assert run(ImportedScorer(path=str(aspects), aspect="style"))["value"][0] == 1
    with pytest.raises(ScoringError, match="no aspect 'size'; it has: style, taste"):
        run(ImportedScorer(path=str(aspects), aspect="size"))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(ScoringError, match="plain feedback files end in"):
        run(ImportedScorer(path=str(tmp_path / "a.txt")))


def test_editing_a_file_changes_the_identity(tmp_path: Path) -> None:
    path = tmp_path / "ratings_{iteration}.jsonl"
    scorer = ImportedScorer(path=str(path))
    assert scorer.identity_at(1)["content"] is None
    row = {"prompt": "Name a fruit.", "response": " An apple.", "value": 5}
    first = plain(tmp_path / "ratings_1.jsonl", [row])
    before, all_before = scorer.identity_at(1), scorer.identity
    plain(tmp_path / "ratings_2.jsonl", [row])
    assert scorer.identity_at(1) == before and scorer.identity != all_before
    plain(first, [{**row, "value": 50}])
    assert scorer.identity_at(1) != before
    json.dumps(scorer.identity)
    moved = plain(tmp_path / "elsewhere.jsonl", [row])
    assert (
        ImportedScorer(path=str(moved)).identity
        == ImportedScorer(path=str(tmp_path / "ratings_2.jsonl")).identity
    )  # by content, not location


@pytest.mark.parametrize("kind", ["reward", "text", "category"])
def test_the_scorer_provides_the_configured_kind(kind: Any) -> None:
    scorer = ImportedScorer(path="/f.jsonl", kind=kind)
    assert scorer.kinds == (kind,) and scorer.better == "higher"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"path": "a_{round}.jsonl"}, "{round} is not a placeholder"),
        ({"path": "a.jsonl", "labels": ["good", "bad"]}, "only format alt uses them"),
        ({"path": "a.jsonl", "format": "sparse_rankings"}, "is not allowed"),
        ({"path": "a.jsonl", "kind": "rating"}, "is not allowed"),
    ],
)
def test_impossible_settings_are_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as error:
        validate(ImportedScorer, content, "here")
    assert message in str(error.value)
