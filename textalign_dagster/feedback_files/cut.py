"""Judgment files of CUT (Xu et al., 2024): a JSON list of Alpaca records with a ``judgment``.

``{"instruction", "input", "output", "judgment" [, "score", "i_ans"]}``; a null judgment means that the
output is satisfactory, and so does a score of 7 or more. The released files contain markers of failed
calls (``$ERROR$``) and praise instead of null, both of which were trained on as criticism: here the
former are ``failed`` and the latter ``unparseable``.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any, Literal

import polars as pl

from textalign_dagster.feedback_files.exported import (
    Exported,
    exported,
    judged_samples,
    one_aspect,
    write_file,
)
from textalign_dagster.feedback_files.imported import (
    Collector,
    Imported,
    Refusal,
    collector,
    finite,
    read_text,
    text_of,
)
from textalign_dagster.feedback_files.json_records import json_list
from textalign_dagster.judging import readings
from textalign_dagster.judging.answers import FLAWED, PERFECT
from textalign_dagster.judging.critique import is_praise, read_judgment
from textalign_dagster.judging.extract import Unreadable
from textalign_dagster.prompts import join_input

POSITIVE_FROM = 7.0
"""The score from which CUT's trainer ignores the judgment."""

Praise = Literal["unusable", "perfect", "flawed"]


def read_cut(
    path: Path,
    *,
    aspect: str = "imported",
    positive_from: float = POSITIVE_FROM,
    praise: Praise = "unusable",
) -> Imported:
    """Reads a CUT or Alpaca file; records without the field ``judgment`` are samples without judgment.

    Args:
        positive_from: the score from which a record counts as satisfactory whatever its judgment.
        praise: how to count a judgment that opens with "perfect" and continues.
    """
    content = read_text(path)
    rows = collector(path, content, aspect)
    return rows.read(
        json_list(content, path), partial(_read_record, positive_from=positive_from, praise=praise)
    )


def _read_record(rows: Collector, record: Any, positive_from: float, praise: Praise) -> None:
    if not isinstance(record, dict):
        raise Refusal("not a JSON object")
    instruction, output = text_of(record, "instruction", blank=False), text_of(record, "output")
    given = record.get("input")
    if not isinstance(given, str | None):
        raise Refusal("no text in `input`")
    score, better = record.get("score"), record.get("i_ans")
    if score is not None and finite(score) is None:
        raise Refusal("no number in `score`")
    prompt = join_input(instruction, given)
    reference = better if isinstance(better, str) and better.strip() else None
    sample = rows.sample(prompt, output, reference=reference, new=True)
    rows.judged(sample, "judgment", **judgement(record, score, positive_from, praise))


def judgement(
    record: dict[str, Any],
    score: float | None = None,
    positive_from: float = POSITIVE_FROM,
    praise: Praise = "unusable",
) -> dict[str, Any]:
    """The field ``judgment`` of a record: label, text and value, or a status with its reason."""
    value = None if score is None else float(score)
    judgment = record.get("judgment")
    if score is not None and score >= positive_from:
        return {"label": PERFECT, "value": value}
    if "judgment" not in record:
        return {"status": "skipped", "reason": "the record has no field `judgment`"}
    if judgment is None:
        return {"label": PERFECT, "value": value}
    if isinstance(judgment, str) and readings.is_sentinel(judgment):
        return {"status": "failed", "reason": f"failure marker in the file: {judgment}"}
    if isinstance(judgment, str) and praise != "unusable" and is_praise(judgment):
        if praise == "perfect":
            return {"label": PERFECT, "value": value}
        return {"label": FLAWED, "text": judgment.strip(), "value": value}
    try:
        critique = read_judgment(judgment)
    except Unreadable as problem:
        return {"status": "unparseable", "reason": str(problem)}
    return {"label": PERFECT if critique is None else FLAWED, "text": critique, "value": value}


def write_cut(path: Path, samples: pl.DataFrame, feedback: pl.DataFrame) -> Exported:
    """Writes judgments of one aspect as a CUT file.

    The format has only two states, and null means satisfactory: judgements that are not ok are
    left out, and so are those that CUT would read differently.
    """
    one_aspect(feedback, ("judgment",), "CUT")
    records, left_out = [], Counter[str]()
    for row in judged_samples(samples, feedback):
        record = {
            "instruction": row["prompt"],
            "input": "",
            "output": row["response"],
            "judgment": row["text"],
        }
        if row["value"] is not None:
            record["score"] = row["value"]
        if row["reference"] is not None:
            record["i_ans"] = row["reference"]
        if row["status"] != "ok":
            left_out[f"{row['status']}: null would mean satisfactory"] += 1
            continue
        back = judgement(record, row["value"], POSITIVE_FROM, "unusable")
        if any(back.get(name) != row[name] for name in ("label", "text", "value")):
            left_out["CUT would read it differently"] += 1
            continue
        records.append(record)
    write_file(path, json.dumps(records, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
    return exported(len(records), left_out)
