"""OpenAI's critiques and Shepherd's judgments, in the published format: which answer is judged, and how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from textalign_dagster.feedback_files.formats import read_feedback, write_feedback
from textalign_dagster.settings import SettingsError


def answer(text: str, *critiques: tuple[str, str], **feedback: Any) -> dict[str, Any]:
    items = [{"text": critique, "refinement": refinement} for critique, refinement in critiques]
    return {"answer": text, "feedback": {"critiques": items, **feedback}}


def write_lines(folder: Path, name: str, *records: Any) -> Path:
    path = folder / name
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return path


def question(text: str, rankings: list[float], *answers: dict[str, Any]) -> dict[str, Any]:
    return {"question": text, "rankings": rankings, "answers": list(answers)}


def test_best_ranked_answer_of_each_question_is_taken_with_all_its_critiques(tmp_path: Path) -> None:
    questions = [
        question(
            "Who?", [0, 2, 1], answer("a"), answer("b", ("Vague.", "b1"), ("Too short.", "b2")), answer("c")
        ),
        question("When?", [1], answer("noon", rating=7)),
        question("Where?", [1], answer("here", ("Wrong.", ""))),
        question("Why?", [1], answer("because", skip=True)),
        question("How?", [1], answer("so", rating=3)),
        question("Which?", [1], answer("", rating=7)),
        question("What?", [1, 2], answer("that", rating=7)),
    ]
    path = write_lines(
        tmp_path, "critiques.jsonl", {"data": {"passage": {"text": "A text."}, "questions": questions}}, "{"
    )
    found = read_feedback(path, "critiques")
    rows = found.feedback.join(found.samples, on="sample_id", suffix="_of", maintain_order="left")
    values = rows.select("prompt", "text_of", "status", "label", "text", "reference").rows()
    assert values == [
        ("A text.\nWho?", "b", "ok", "flawed", "Vague. Too short.", "b2"),
        ("A text.\nWhen?", "noon", "ok", "perfect", None, None),
        ("A text.\nWhere?", "here", "ok", "flawed", "Wrong.", None),
        ("A text.\nWhy?", "because", "skipped", None, None, None),
        ("A text.\nHow?", "so", "unparseable", None, None, None),
        ("A text.\nWhich?", "", "skipped", None, None, None),
    ]
    assert rows["reason"].drop_nulls().to_list() == [
        "marked `skip` in the file",
        "no critique, but the rating is 3, not 7",
        "the answer is empty",
    ]
    assert [(row.line, row.reason) for row in found.refused] == [
        (1, "1 answers with the rankings [1, 2]"),
        (2, "no object in `data`"),
    ]


SHEPHERD = [
    {"question": "Q1", "answer": "A1", "feedback": "The year is wrong."},
    {"question": "Q2", "answer": "A2", "feedback": "The answer is perfect, and complete."},
    {"question": "Q3", "answer": "A3", "feedback": "Too long."},
]


def test_shepherd_with_the_amended_responses_of_the_neighbouring_file(tmp_path: Path) -> None:
    path = write_lines(tmp_path, "human_data_for_model.jsonl", *SHEPHERD)
    alone = read_feedback(path, "shepherd")
    assert alone.samples["reference"].null_count() == 3 and not alone.refused
    assert alone.feedback.select("status", "label", "text").rows() == [
        ("ok", "flawed", "The year is wrong."),
        ("unparseable", None, None),  # the released code trained on praise as criticism
        ("ok", "flawed", "Too long."),
    ]
    raw = [
        {"metadata": {"context": f"Q{i}", "output_candidate": f"A{i}", "output_correct": f"B{i}"}}
        for i in (1, 2, 4)
    ]
    write_lines(tmp_path, "human_data_raw.jsonl", *raw)
    found = read_feedback(path, "shepherd")
    assert found.samples["reference"].to_list() == ["B1", "B2"]
    assert [(row.line, row.reason) for row in found.refused] == [
        (3, "the same line of human_data_raw.jsonl is about another answer")
    ]


def test_these_formats_are_read_only(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"^shepherd: this format is read-only; write `cut`"):
        write_feedback(tmp_path / "f.jsonl", "shepherd", pl.DataFrame(), pl.DataFrame())
