"""Preferences and labels in the forms of common datasets and libraries, recognised by a row's columns.

========================================  ==========================================================
columns                                   form
========================================  ==========================================================
``chosen``, ``rejected`` [, ``prompt``]   a pair: TRL's, HH's (whole transcripts), UltraFeedback binarized
``history``, ``human_ref_A``,             a pair: SHP; ``labels`` 1: A is better
``human_ref_B``, ``labels``
``instruction``, ``completions``          rated responses: UltraFeedback (``overall_score``)
``prompt``, ``completion``, ``label``     a response that is good or not: TRL's unpaired preferences
``prompt``, ``completion``                a response without judgment (a demonstration)
``messages``                              the same, as a conversation that ends with the response
``type``                                  HALOs: sample, binary_feedback, pairwise_feedback, scalar_feedback
========================================  ==========================================================

Texts may be conversations (lists of ``{"role", "content"}``); a prompt then becomes a transcript
(:mod:`textalign_dagster.turns`), which tasks read. A good response has the value 1, a bad one 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from textalign_dagster.feedback_files.exported import Exported, compared_samples, exported, write_file
from textalign_dagster.feedback_files.imported import (
    Collector,
    Imported,
    Refusal,
    collector,
    finite,
    read_text,
    text_of,
)
from textalign_dagster.feedback_files.json_records import json_list, json_text
from textalign_dagster.settings import SettingsError
from textalign_dagster.turns import (
    BadDialogue,
    Dialogue,
    parse_messages,
    parse_transcript,
    split_answer,
    transcript,
)

NOT_JUDGED = "an unjudged demonstration"

Record = dict[str, Any]


def read_preferences(path: Path, *, aspect: str = "preference") -> Imported:
    """Reads a .json, .jsonl or .parquet file of rows in the forms above, which may be mixed.

    Raises:
        SettingsError: the file cannot be read, or has another extension.
    """
    records: Iterator[tuple[int, Any]]
    if path.suffix == ".parquet":
        try:
            rows = collector(path, path.read_bytes(), aspect)
            records = enumerate(pl.read_parquet(path, glob=False).iter_rows(named=True), start=1)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise SettingsError(f"{path}: cannot be read: {str(error).splitlines()[0]}") from None
    elif path.suffix in (".json", ".jsonl"):
        content = read_text(path)
        rows, records = collector(path, content, aspect), json_list(content, path)
    else:
        raise SettingsError(f"{path}: preference files end in .json, .jsonl or .parquet")
    return rows.read(records, _read_record)


def write_preferences(path: Path, samples: pl.DataFrame, pairs: pl.DataFrame) -> Exported:
    """Writes comparisons as TRL's explicit preferences, JSON Lines: ``prompt``, ``chosen``, ``rejected``.

    Args:
        samples: sample_id, prompt, text.
        pairs: rows of PAIRS; those without a winner are left out.
    """
    rows, left_out = [], Counter[str]()
    for pair, prompt, a, b in compared_samples(samples, pairs):
        if pair["winner"] not in ("a", "b"):
            left_out[pair["status"] if pair["status"] != "ok" else "a tie, which the format cannot hold"] += 1
            continue
        chosen, rejected = (a, b) if pair["winner"] == "a" else (b, a)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    write_file(path, json_text(rows))
    return exported(len(rows), left_out)


def _read_record(rows: Collector, record: Any) -> None:
    try:
        _reader_of(record)(rows, record)
    except BadDialogue as problem:
        raise Refusal(str(problem)) from None


def _reader_of(record: Any) -> Callable[[Collector, Record], None]:
    if not isinstance(record, dict):
        raise Refusal("not a JSON object")
    given = {name for name, value in record.items() if value is not None}
    if record.get("type") in HALOS:
        return HALOS[record["type"]]
    for columns, reader in FORMS.items():
        if given.issuperset(columns):
            return reader
    raise Refusal(f"none of the known forms; its columns: {', '.join(sorted(given)) or 'none'}")


# Forms


def _pair(rows: Collector, record: Record) -> None:
    prompt, chosen = _answered(record.get("prompt"), record["chosen"], "chosen")
    other, rejected = _answered(record.get("prompt"), record["rejected"], "rejected")
    if prompt != other:
        raise Refusal("`chosen` and `rejected` answer different prompts")
    _compare(rows, prompt, chosen, rejected, "a")


def _shp(rows: Collector, record: Record) -> None:
    a, b = text_of(record, "human_ref_A"), text_of(record, "human_ref_B")
    _compare(rows, text_of(record, "history", blank=False), a, b, _winner(record["labels"], "labels"))


def _ultrafeedback(rows: Collector, record: Record) -> None:
    prompt, completions = text_of(record, "instruction", blank=False), record["completions"]
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        raise Refusal("no list of objects in `completions`")
    read = [(text_of(c, "response"), c.get("overall_score")) for c in completions]
    for response, score in read:
        sample = rows.sample(prompt, response, new=True)
        if (number := finite(score)) is None:
            rows.judged(
                sample, "rating", "unparseable", reason=f"`overall_score` is not a number: {score!r:.40}"
            )
        else:
            rows.judged(sample, "rating", value=number)


def _labelled(rows: Collector, record: Record) -> None:
    prompt, response = _answered(record["prompt"], record["completion"], "completion")
    good = _winner(record["label"], "label") == "a"
    rows.judged(rows.sample(prompt, response, new=True), "reward", value=float(good))


def _demonstration(rows: Collector, record: Record) -> None:
    if "messages" in record and record["messages"] is not None:
        prompt, response = _answered(None, record["messages"], "messages")
    else:
        prompt, response = _answered(record["prompt"], record["completion"], "completion")
    _unjudged(rows, prompt, response)


def _sample(rows: Collector, record: Record) -> None:
    _unjudged(rows, *_halos(record, "output"))


def _binary(rows: Collector, record: Record) -> None:
    good = _winner(record.get("label"), "label") == "a"
    rows.judged(rows.sample(*_halos(record, "output"), new=True), "reward", value=float(good))


def _scalar(rows: Collector, record: Record) -> None:
    value = finite(record.get("reward"))
    if value is None:
        raise Refusal("no number in `reward`")
    rows.judged(rows.sample(*_halos(record, "output"), new=True), "reward", value=value)


def _pairwise(rows: Collector, record: Record) -> None:
    (prompt, a), (_, b) = _halos(record, "output_A"), _halos(record, "output_B")
    _compare(rows, prompt, a, b, _winner(record.get("label"), "label"))


FORMS: Mapping[tuple[str, ...], Callable[[Collector, Record], None]] = {
    ("history", "human_ref_A", "human_ref_B", "labels"): _shp,
    ("instruction", "completions"): _ultrafeedback,
    ("chosen", "rejected"): _pair,
    ("prompt", "completion", "label"): _labelled,
    ("prompt", "completion"): _demonstration,
    ("messages",): _demonstration,
}
"""Columns → reader of a row that has them; the first match counts."""

HALOS: Mapping[Any, Callable[[Collector, Record], None]] = {
    "sample": _sample,
    "binary_feedback": _binary,
    "pairwise_feedback": _pairwise,
    "scalar_feedback": _scalar,
}
"""HALOs' ``type`` → reader of such a row."""


# Parts of rows


def _compare(rows: Collector, prompt: str, a: str, b: str, winner: str) -> None:
    if a == b:
        raise Refusal("both responses are the same text")
    rows.compared(prompt, rows.sample(prompt, a), rows.sample(prompt, b), winner)


def _unjudged(rows: Collector, prompt: str, response: str) -> None:
    rows.judged(rows.sample(prompt, response, new=True), "none", "skipped", reason=NOT_JUDGED)


def _answered(prompt: Any, response: Any, name: str) -> tuple[str, str]:
    """Prompt and response, each either text or a conversation; without a prompt, ``response`` holds both."""
    if isinstance(response, list):
        turns = parse_messages(response)
        if len(turns) == 1 and turns[0].role == "assistant" and prompt is not None:
            return _prompt(prompt), turns[0].content
        return _split(turns, name)
    text = text_of({name: response}, name, blank=False)
    if prompt is None:
        try:
            return _split(parse_transcript(text), name)
        except BadDialogue as problem:
            raise Refusal(f"no `prompt`, and `{name}` is not a transcript: {problem}") from None
    return _prompt(prompt), text


def _prompt(value: Any) -> str:
    if isinstance(value, list):
        return transcript(split_answer(parse_messages(value))[0])
    return text_of({"prompt": value}, "prompt", blank=False)


def _split(turns: Dialogue, name: str) -> tuple[str, str]:
    shown, answer = split_answer(turns)
    if answer is None:
        raise Refusal(f"`{name}` does not end with the assistant's turn")
    return transcript(shown), answer


def _halos(record: Record, name: str) -> tuple[str, str]:
    return _answered(record.get("prompt") or record.get("instruction") or "", record.get(name), name)


def _winner(label: Any, name: str) -> str:
    if label not in (0, 1):  # True and False equal 1 and 0
        raise Refusal(f"`{name}` is neither 1 (true) nor 0 (false)")
    return "a" if label else "b"
