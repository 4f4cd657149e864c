"""Which judgement of a file is about which sample."""

from __future__ import annotations

from collections import Counter
from typing import Any

import polars as pl

from textalign_dagster.methods import FeedbackKind

Key = tuple[str, str]


def match_judgements(
    samples: pl.DataFrame, known: pl.DataFrame, judgements: pl.DataFrame, kind: FeedbackKind
) -> list[dict[str, Any]]:
    """The judgement of every sample, in order: by its id, else by its prompt and text.

    A file may repeat a prompt and text; the n-th of these goes to the n-th such sample, the last one
    to all further ones. Blanks around prompt and text do not matter.

    Args:
        samples: sample_id, prompt, text.
        known: the file's samples: sample_id, prompt, text.
        judgements: one row of FEEDBACK for each of them, of one aspect.
        kind: what is taken of a judgement; one that does not hold it is ``skipped``.

    Returns:
        value, label, text, status, reason of each.
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
    """A judgement as feedback of this kind, or the reason why it is none."""
    if row is None:
        return nothing("skipped", "no judgement in the file")
    if row["status"] != "ok":
        return nothing(row["status"], row["reason"])
    value, label, text = row["value"], row["label"], row["text"]
    if kind == "reward":
        lacks = "number" if value is None else None
        label = text = None
    elif kind == "text":
        lacks = "number beside its words" if value is None else None if text else "words"
        label = None
    elif kind == "judgment":
        lacks = None if label or text else "judgment"
    else:
        lacks = None if label else "label"
        text = None
    if lacks:
        return nothing("skipped", f"its judgement in the file has no {lacks}")
    return {"value": value, "label": label, "text": text, "status": "ok", "reason": None}


def nothing(status: str, reason: str) -> dict[str, Any]:
    """No judgement, and why."""
    return {"value": None, "label": None, "text": None, "status": status, "reason": reason}
