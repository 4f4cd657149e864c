"""Preferences in the columns of well-known datasets: every form, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from textalign_dagster.feedback_files.formats import read_feedback, write_feedback
from textalign_dagster.feedback_files.imported import Imported
from textalign_dagster.settings import SettingsError

USER, REPLY = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
BAD_REPLY = {"role": "assistant", "content": "Go away."}
TRANSCRIPT = "Human: Hi?\n\nAssistant:"
HH = f"\n\n{TRANSCRIPT} Hello."


def load(tmp_path: Path, *records: Any, name: str = "file.jsonl") -> Imported:
    path = tmp_path / name
    text = json.dumps(records) if name.endswith(".json") else "\n".join(map(json.dumps, records))
    path.write_text(text, encoding="utf-8")
    return read_feedback(path, "preferences")


@pytest.mark.parametrize(
    ("record", "prompt", "better", "worse"),
    [
        ({"prompt": "P", "chosen": "x", "rejected": "y"}, "P", "x", "y"),
        ({"prompt": [USER], "chosen": [REPLY], "rejected": [BAD_REPLY]}, TRANSCRIPT, "Hello.", "Go away."),
        # Without a prompt column: conversations and transcripts contain the prompt.
        ({"chosen": [USER, REPLY], "rejected": [USER, BAD_REPLY]}, TRANSCRIPT, "Hello.", "Go away."),
        ({"chosen": HH, "rejected": f"{TRANSCRIPT} No."}, TRANSCRIPT, "Hello.", "No."),
        # UltraFeedback binarized gives the prompt twice.
        ({"prompt": "Hi?", "chosen": [USER, REPLY], "rejected": [USER, BAD_REPLY]}, TRANSCRIPT, "Hello.", "Go away."),
        ({"history": "P", "human_ref_A": "x", "human_ref_B": "y", "labels": 1}, "P", "x", "y"),
        ({"history": "P", "human_ref_A": "x", "human_ref_B": "y", "labels": 0}, "P", "y", "x"),
        (
            {"type": "pairwise_feedback", "prompt": [USER], "output_A": [REPLY], "output_B": [BAD_REPLY], "label": 0},
            TRANSCRIPT,
            "Go away.",
            "Hello.",
        ),
    ],
)  # fmt: skip
def test_pairs(tmp_path: Path, record: dict[str, Any], prompt: str, better: str, worse: str) -> None:
    found = load(tmp_path, record)
    assert not found.refused and found.feedback.is_empty()
    texts = dict(found.samples.select("sample_id", "text").iter_rows())
    assert set(found.samples["prompt"]) == {prompt}
    (pair,) = found.pairs.iter_rows(named=True)
    sides = texts[pair["sample_a"]], texts[pair["sample_b"]]
    assert pair["status"] == "ok" and (sides if pair["winner"] == "a" else sides[::-1]) == (better, worse)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "P", "completion": "x", "label": True}, ("ok", 1.0)),
        ({"prompt": "P", "completion": "x", "label": False}, ("ok", 0.0)),
        ({"prompt": "P", "completion": "x"}, ("skipped", None)),
        ({"messages": [USER, REPLY]}, ("skipped", None)),
        ({"type": "binary_feedback", "prompt": [USER], "output": [REPLY], "label": 1, "reward": 3.5}, ("ok", 1.0)),
        ({"type": "scalar_feedback", "instruction": "P", "output": "x", "reward": -2.5}, ("ok", -2.5)),
        ({"type": "sample", "instruction": "P", "output": "x"}, ("skipped", None)),
    ],
)  # fmt: skip
def test_single_responses(tmp_path: Path, record: dict[str, Any], expected: tuple[str, float | None]) -> None:
    found = load(tmp_path, record)
    assert not found.refused and found.feedback.select("status", "value").rows() == [expected]


def test_rated_responses_of_ultrafeedback_in_parquet(tmp_path: Path) -> None:
    rated = [{"response": "x", "overall_score": 8.5}, {"response": "y", "overall_score": float("nan")}]
    path = tmp_path / "file.parquet"
    pl.DataFrame([{"instruction": "P", "completions": rated}]).write_parquet(path)
    found = read_feedback(path, "preferences").feedback
    assert found.select("status", "value").rows() == [("ok", 8.5), ("unparseable", None)]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"question": "P", "answer": "x"}, "none of the known forms; its columns: answer, question"),
        ([1], "not a JSON object"),
        ({"chosen": "x", "rejected": "y"}, "no `prompt`, and `chosen` is not a transcript"),
        ({"prompt": "P", "chosen": "x", "rejected": "x"}, "both responses are the same text"),
        ({"prompt": " ", "chosen": "x", "rejected": "y"}, "`prompt` is blank"),
        ({"prompt": "P", "chosen": "x", "rejected": 3}, "no text in `rejected`"),
        ({"chosen": HH, "rejected": "Human: Ho?\n\nAssistant: No."}, "answer different prompts"),
        ({"chosen": [USER], "rejected": [USER]}, "`chosen` does not end with the assistant's turn"),
        ({"prompt": "P", "completion": "x", "label": "good"}, "`label` is neither 1 (true) nor 0 (false)"),
        ({"type": "scalar_feedback", "prompt": "P", "output": "x", "reward": "$ERROR$"}, "no number in `reward`"),
        ({"instruction": "P", "completions": "x"}, "no list of objects in `completions`"),
    ],
)  # fmt: skip
def test_refused_rows(tmp_path: Path, record: Any, reason: str) -> None:
    found = load(tmp_path, {"prompt": "P", "chosen": "x", "rejected": "y"}, record)
    assert found.pairs.height == 1
    (refused,) = found.refused
    assert refused.line == 2 and reason in refused.reason


def test_other_file_types_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"end in \.json, \.jsonl or \.parquet"):
        load(tmp_path, {}, name="file.txt")


def test_round_trip(tmp_path: Path) -> None:
    records = [
        {"prompt": "P", "chosen": "x", "rejected": "y"},
        {"prompt": "Q", "chosen": "b", "rejected": "a"},
    ]
    imported = load(tmp_path, *records, name="file.json")
    tie = imported.pairs.head(1).with_columns(winner=pl.lit("tie"))
    out = tmp_path / "out.jsonl"
    exported = write_feedback(
        out, "preferences", imported.samples, imported.feedback, pl.concat([imported.pairs, tie])
    )
    assert exported.rows == 2 and exported.left_out == {"a tie, which the format cannot hold": 1}
    written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert sorted(written, key=lambda row: row["prompt"]) == records
