"""Feedback as plain rows, in JSON Lines or Parquet: the format for importing your own judgements.

A row is a judgement of a response::

    {"prompt", "response", "value" | "label" | "feedback" …, or "status" and "reason"}

or a comparison of two::

    {"prompt", "response_a", "response_b", "winner": "a" | "b" | "tie"}

Optional: ``aspect``, ``kind``, ``reference``, ids (``sample_id``, or ``sample_a`` and ``sample_b``),
``favoured``, ``scorer``, ``scorer_version``, ``parser_version``, ``call_keys``. Our own exports have
all of them and read back unchanged.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from textalign_dagster.feedback_files.exported import (
    Exported,
    compared_samples,
    exported,
    judged_samples,
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
from textalign_dagster.feedback_files.json_records import json_lines, json_text
from textalign_dagster.settings import SettingsError
from textalign_dagster.tables import STATUSES

KINDS = ("reward", "category", "text", "judgment", "rating", "ranking", "none")
_PROVENANCE = {
    "aspect": pl.String,
    "status": pl.String,
    "reason": pl.String,
    "scorer": pl.String,
    "scorer_version": pl.String,
    "parser_version": pl.String,
    "call_keys": pl.List(pl.String),
}
COLUMNS = pl.Schema(
    {  # type: ignore[arg-type]  # mypy joins type classes and instances to object
        "prompt": pl.String,
        "sample_id": pl.String,
        "response": pl.String,
        "reference": pl.String,
        "kind": pl.String,
        "value": pl.Float64,
        "label": pl.String,
        "feedback": pl.String,
        "sample_a": pl.String,
        "sample_b": pl.String,
        "response_a": pl.String,
        "response_b": pl.String,
        "winner": pl.String,
        "favoured": pl.String,
        **_PROVENANCE,
    }
)
"""All columns that are read; exports have exactly these."""


def read_plain(path: Path, *, aspect: str = "imported") -> Imported:
    """Reads a .jsonl or .parquet file of judgements and comparisons.

    Raises:
        SettingsError: the file cannot be read, or has another extension.
    """
    if path.suffix == ".parquet":
        try:
            frame = pl.read_parquet(path, glob=False)
            rows = collector(path, path.read_bytes(), aspect)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise SettingsError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
        records: Iterator[tuple[int, Any]] = enumerate(frame.iter_rows(named=True), start=1)
    elif path.suffix == ".jsonl":
        content = read_text(path)
        rows, records = collector(path, content, aspect), json_lines(content)
    else:
        raise SettingsError(f"{path}: plain feedback files end in .jsonl or .parquet")
    return rows.read(records, _read_record)


def _read_record(rows: Collector, record: Any) -> None:
    if not isinstance(record, dict):
        raise Refusal("not a JSON object")
    given = {name: value for name, value in record.items() if value is not None}
    for name in given.keys() - set(COLUMNS):
        rows.notes[f"the column `{name}` is ignored"] += 1
    prompt = text_of(given, "prompt", blank=False)
    pair = "response_a" in given or "response_b" in given
    texts = {name for name, kind in COLUMNS.items() if kind == pl.String and name != "prompt"}
    for name in texts & given.keys():
        text_of(given, name)
    keys = given.get("call_keys", [])
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise Refusal("`call_keys` is not a list of strings")
    provenance = {name: given[name] for name in _PROVENANCE if name in given and name != "status"}
    if "scorer" in provenance:
        # The file's own hash is not a version of another scorer.
        provenance.setdefault("scorer_version", None)
    status = given.get("status", "ok")
    if status not in STATUSES:
        raise Refusal(f"`status` is not one of {', '.join(STATUSES)}")
    carries = ("winner",) if pair else ("value", "label", "feedback")
    if status == "ok" and not any(name in given for name in carries):
        raise Refusal(f"no judgement ({', '.join(carries)})")
    if status == "ok" and "reason" in given:
        raise Refusal("`reason` is only for rows that are not ok")
    if status != "ok" and (any(name in given for name in carries) or "reason" not in given):
        raise Refusal("a row that is not ok must have a `reason` and no judgement")
    (_pair if pair else _single)(rows, prompt, given, status, provenance)


def _single(
    rows: Collector, prompt: str, given: dict[str, Any], status: str, provenance: dict[str, Any]
) -> None:
    value = given.get("value")
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise Refusal("`value` is not a number")
    if value is not None and finite(value) is None:
        raise Refusal("`value` is not finite")
    feedback, label = given.get("feedback"), given.get("label")
    likely = (
        "text"
        if feedback and value is not None
        else "judgment"
        if feedback
        else "category"
        if label
        else "reward"
    )
    kind = given.get("kind", likely)
    if kind not in KINDS:
        raise Refusal(f"`kind` is not one of {', '.join(KINDS)}")
    response = text_of(given, "response")
    sample = rows.sample(prompt, response, own_id=given.get("sample_id"), reference=given.get("reference"))
    number = float(value) if value is not None else None
    rows.judged(sample, kind, status, value=number, label=label, text=feedback, **provenance)


def _pair(
    rows: Collector, prompt: str, given: dict[str, Any], status: str, provenance: dict[str, Any]
) -> None:
    if given.get("winner") not in ("a", "b", "tie", None):
        raise Refusal("`winner` is not one of a, b, tie")
    if given.get("favoured") not in ("first", "second", None):
        raise Refusal("`favoured` is not one of first, second")
    texts = [text_of(given, f"response_{side}") for side in "ab"]
    ids = [given.get(f"sample_{side}") for side in "ab"]
    if texts[0] == texts[1] and ids[0] == ids[1]:
        raise Refusal("both responses are the same sample")
    a, b = (rows.sample(prompt, text, own_id=own) for text, own in zip(texts, ids, strict=True))
    rows.compared(prompt, a, b, given.get("winner"), status, favoured=given.get("favoured"), **provenance)


def write_plain(path: Path, samples: pl.DataFrame, feedback: pl.DataFrame, pairs: pl.DataFrame) -> Exported:
    """Writes all feedback and pairs, whatever their aspects.

    Args:
        samples: sample_id, prompt, text, and optionally reference.
        feedback: rows of FEEDBACK.
        pairs: rows of PAIRS.
    """
    rows = [{**row, "feedback": row["text"]} for row in judged_samples(samples, feedback)]
    for pair, prompt, first, second in compared_samples(samples, pairs):
        rows.append({**pair, "prompt": prompt, "response_a": first, "response_b": second})
    return _write(path, rows)


def write_unjudged(path: Path, samples: pl.DataFrame) -> Exported:
    """Writes samples to be judged: sample_id, prompt, reference, response, and no judgement.

    Args:
        samples: sample_id, prompt, text, and optionally reference.
    """
    return _write(path, ({**row, "response": row["text"]} for row in samples.iter_rows(named=True)))


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> Exported:
    kept = [{name: row.get(name) for name in COLUMNS} for row in rows]
    if path.suffix == ".parquet":
        data = io.BytesIO()
        pl.DataFrame(kept, COLUMNS).write_parquet(data)
        write_file(path, data.getvalue())
    elif path.suffix == ".jsonl":
        filled = ({n: v for n, v in row.items() if v is not None and v != []} for row in kept)
        write_file(path, json_text(filled))
    else:
        raise ValueError(f"{path}: plain feedback files end in .jsonl or .parquet")
    return exported(len(kept), Counter())
