"""Matching the judgements of a file to samples."""

from __future__ import annotations

from collections import Counter
from typing import Any

import polars as pl

from textalign_dagster.methods import FeedbackKind

Key = tuple[str, str]


def match_judgements(
    samples: pl.DataFrame, known: pl.DataFrame, judgements: pl.DataFrame, kind: FeedbackKind
) -> list[dict[str, Any]]:
    """The judgement of every sample, in order: matched by id, else by prompt and text.

    A file can repeat a prompt and text; the n-th of these goes to the n-th such sample, the last one
    to all further ones. Whitespace around prompt and text is ignored.

    Args:
        samples: sample_id, prompt, text.
        known: the file's samples: sample_id, prompt, text.
        judgements: one row of FEEDBACK for each of them, of one aspect.
        kind: what is used of a judgement; one without it is ``skipped``.

    Returns:
        value, label, text, status and reason of each.
    """
    by_id = {row["sample_id"]: row for row in judgements.iter_rows(named=True)}
    by_text: dict[Key, list[dict[str, Any]]] = {}
    for own_id, prompt, text in known.select("sample_id", "prompt", "text").iter_rows():
        if own_id in by_id:
            by_text.setdefault(_key(prompt, text), []).append(by_id[own_id])
    used = Counter[Key]()
    found = []
    for sample_id, prompt, text in samples.select("sample_id", "prompt", "text").iter_rows():
        row = by_id.get(sample_id)
        if row is None:
            key = _key(prompt, text)
            same = by_text.get(key, [])
            row = same[min(used[key], len(same) - 1)] if same else None
            used[key] += 1
        found.append(taken(row, kind))
    return found


def _key(prompt: str, text: str) -> Key:
    return prompt.strip(), text.strip()


def taken(row: dict[str, Any] | None, kind: FeedbackKind) -> dict[str, Any]:
    """A judgement as feedback of this kind, or the status and reason why it is not."""
    if row is None:
        return nothing("skipped", "no judgement in the file")
    if row["status"] != "ok":
        return nothing(row["status"], row["reason"])
    value, label, text = row["value"], row["label"], row["text"]
    if kind == "reward":
        missing = "number" if value is None else None
        label = text = None
    elif kind == "text":
        missing = "number with its words" if value is None else None if text else "words"
        label = None
    elif kind == "judgment":
        missing = None if label or text else "judgment"
    else:
        missing = None if label else "label"
        text = None
    if missing:
        return nothing("skipped", f"its judgement in the file has no {missing}")
    return {"value": value, "label": label, "text": text, "status": "ok", "reason": None}


def nothing(status: str, reason: str) -> dict[str, Any]:
    """Feedback without a value, with its status and reason."""
    return {"value": None, "label": None, "text": None, "status": status, "reason": reason}
