"""Two published sets of critiques, converted as in CUT's training code: OpenAI's on summaries, and Shepherd's.

Source: Saunders et al. 2022 (arXiv:2206.05802), and Wang et al. 2023 (arXiv:2308.04592); the conversion is that of
Xu et al. 2024 (arXiv:2312.14591, appendix A), where unjudged answers were silently left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from textalign_dagster.feedback_files.cut import judgement
from textalign_dagster.feedback_files.imported import (
    Collector,
    Imported,
    Refusal,
    collector,
    read_text,
    text_of,
)
from textalign_dagster.feedback_files.json_records import json_lines

SATISFIED = 7
"""The rating of a summary without criticism."""

CANDIDATES = "human_data_raw.jsonl"
"""The file next to Shepherd's judgments that has the amended responses."""


def read_critiques(path: Path, *, aspect: str = "imported") -> Imported:
    """Reads OpenAI's critiques (`critiques.train.jsonl`): a passage, questions about it, and ranked answers with critiques.

    For each question, the highest-ranked answer is used: its critiques, joined, are the judgment (no critique and a
    rating of 7 mean no fault), and the last refinement is the amended response. Answers that annotators skipped are
    ``skipped``.
    """
    content = read_text(path)
    rows = collector(path, content, aspect)
    for line, record in json_lines(content):
        rows.rows += 1
        try:
            data = _object(record, "data")
            passage = text_of(_object(data, "passage"), "text", blank=False)
            questions = _list(data, "questions")
        except Refusal as reason:
            rows.refuse(line, str(reason), record)
            continue
        for question in questions:
            try:
                _read_question(rows, passage, question)
            except Refusal as reason:
                rows.refuse(line, str(reason), question)
    return rows.done()


def read_shepherd(path: Path, *, aspect: str = "imported") -> Imported:
    """Reads Shepherd's judgments (`human_data_for_model.jsonl`): question, answer, feedback.

    If `human_data_raw.jsonl`, which has the same answers line by line, is next to it, amended responses are also read.
    """
    content = read_text(path)
    rows = collector(path, content, aspect)
    raw = path.with_name(CANDIDATES)
    candidates = dict(json_lines(read_text(raw))) if raw.is_file() else {}
    for line, record in json_lines(content):
        rows.rows += 1
        try:
            if not isinstance(record, dict):
                raise Refusal("not a JSON object")
            question, answer = text_of(record, "question", blank=False), text_of(record, "answer")
            amended = _amended(candidates[line], question, answer) if line in candidates else None
            sample = rows.sample(question, answer, reference=amended, new=True)
            rows.judged(sample, "judgment", **judgement(record | {"judgment": record.get("feedback")}))
        except Refusal as reason:
            rows.refuse(line, str(reason), record)
    return rows.done()


def _read_question(rows: Collector, passage: str, question: Any) -> None:
    if not isinstance(question, dict):
        raise Refusal("no object in `questions`")
    query = text_of(question, "question", blank=False)
    answers, rankings = _list(question, "answers"), _list(question, "rankings")
    if len(answers) != len(rankings) or not all(isinstance(rank, int | float) for rank in rankings):
        raise Refusal(f"{len(answers)} answers with the rankings {rankings}")
    best = answers[rankings.index(max(rankings))]
    feedback = _object(best, "feedback")
    answer, critiques = text_of(best, "answer"), feedback.get("critiques") or []
    if not isinstance(critiques, list) or not all(isinstance(critique, dict) for critique in critiques):
        raise Refusal("no list of objects in `critiques`")
    texts = [text_of(critique, "text") for critique in critiques]
    refinements = [critique.get("refinement") for critique in critiques]
    amended = refinements[-1] if refinements and isinstance(refinements[-1], str) else None
    sample = rows.sample(f"{passage}\n{query}", answer, reference=amended or None, new=True)
    if feedback.get("skip") or not answer.strip():
        why = "marked `skip` in the file" if feedback.get("skip") else "the answer is empty"
        rows.judged(sample, "judgment", status="skipped", reason=why)
    elif not texts and feedback.get("rating") != SATISFIED:
        why = f"no critique, but the rating is {feedback.get('rating')}, not {SATISFIED}"
        rows.judged(sample, "judgment", status="unparseable", reason=why)
    else:
        rows.judged(sample, "judgment", **judgement({"judgment": " ".join(texts).strip() if texts else None}))


def _amended(record: Any, question: str, answer: str) -> str | None:
    """The amended response on the same line of the raw file, which must be about the same answer."""
    about = _object(record, "metadata")
    if about.get("context") != question or about.get("output_candidate") != answer:
        raise Refusal(f"the same line of {CANDIDATES} is about another answer")
    amended = about.get("output_correct")
    return amended if isinstance(amended, str) and amended.strip() else None


def _object(record: Any, name: str) -> dict[str, Any]:
    found = record.get(name) if isinstance(record, dict) else None
    if not isinstance(found, dict):
        raise Refusal(f"no object in `{name}`")
    return found


def _list(record: dict[str, Any], name: str) -> list[Any]:
    found = record.get(name)
    if not isinstance(found, list) or not found:
        raise Refusal(f"no list in `{name}`")
    return found
