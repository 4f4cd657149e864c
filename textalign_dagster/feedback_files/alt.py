"""Feedback files of ALT (Abadal Lloret et al., 2024): JSON Lines, one prompt and its generations per line.

``{"prompt", "generations": [text], "rewards" | "feedbacks" [, "scores", "analysis"]: [one each]}``,
and for toxicity ``"generations": [{"text", "toxicity"}]``. In sampling files ``prompt`` includes the
condition; feedback files hold the plain prompt. A line may also have ``perplexity``, one number for
its one generation. Prompt files, and what all ALT files share, are in `alt_prompts`.

Our own files add ``sample_ids``, ``statuses`` and ``reasons``, so that they read back unchanged;
programs that look up fields by name are not affected.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl

from textalign_dagster.feedback_files.alt_prompts import Conditioned, alt_text, prompt_of
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
    list_of,
    text_of,
)
from textalign_dagster.feedback_files.json_records import json_lines, json_text
from textalign_dagster.judging.labels import match_label
from textalign_dagster.judging.readings import excerpt, mended
from textalign_dagster.methods.categories import CATEGORIES
from textalign_dagster.tables import STATUSES

_PER_GENERATION = ("rewards", "feedbacks", "scores", "statuses", "reasons", "sample_ids")


def read_alt(
    path: Path,
    *,
    aspect: str = "imported",
    labels: Sequence[str] = CATEGORIES,
    scores: tuple[float, float] = (0, 3),
    template: str | None = None,
) -> Imported:
    """Reads an ALT file with generations, judged or not.

    A null is a failed judgement. Scores out of range and unknown labels (some of which the released
    code trained on) are ``unparseable``. Repeats of a generation are separate samples.

    Args:
        labels: the categories of files that have feedbacks without scores.
        scores: lowest and highest score of files that have both.
        template: how conditions were put before the prompts; None: the prompts are kept unchanged.

    Raises:
        SettingsError: the file cannot be read or is a pickle, or the template is invalid.
    """
    content = alt_text(path)
    conditioned = Conditioned(template) if template is not None else None
    rows = collector(path, content, aspect)
    take = partial(_read_record, labels=labels, scores=scores, conditioned=conditioned)
    return rows.read(json_lines(content), take)


def _read_record(
    rows: Collector,
    record: Any,
    labels: Sequence[str],
    scores: tuple[float, float],
    conditioned: Conditioned | None,
) -> None:
    prompt = prompt_of(record)
    if conditioned is not None:
        condition, prompt = conditioned.undo(prompt)
        if condition is not None:
            rows.notes[f"sampled under the condition {excerpt(condition)!r}"] += 1
    generations = record.get("generations")
    if not isinstance(generations, list):
        raise Refusal("no list in `generations`")
    given = {n: list_of(record, n, len(generations)) for n in _PER_GENERATION if record.get(n) is not None}
    texts: list[Any] = [g.get("text") if isinstance(g, dict) else g for g in generations]
    for text in texts:
        text_of({"a generation": text}, "a generation")
    ids = given.get("sample_ids", [None] * len(texts))
    if not all(own is None or (isinstance(own, str) and own) for own in ids):
        raise Refusal("a sample id is not text")
    if len({own for own in ids if own}) < len([own for own in ids if own]) or rows.samples.keys() & set(ids):
        raise Refusal("a sample id is repeated")
    if record.get("analysis") is not None:
        rows.notes["`analysis` is not kept: FEEDBACK has no column for it"] += 1
    for i, (text, generation) in enumerate(zip(texts, generations, strict=True)):
        sample = rows.sample(prompt, text, own_id=ids[i], new=True)
        entry = {name: values[i] for name, values in given.items()}
        if isinstance(generation, dict):
            entry["toxicity"] = generation.get("toxicity")
        judged = _judgement(entry, labels, scores)
        if judged["status"] != "skipped" or "perplexity" not in record or len(texts) > 1:
            rows.judged(sample, **judged)
        if "perplexity" in record and len(texts) == 1:
            rows.judged(sample, **_perplexity(record["perplexity"]))
    if "perplexity" in record and len(texts) != 1:
        # Here the released script paired the first generations with the wrong prompts.
        rows.notes["`perplexity` is not kept: its line has several generations"] += 1


def _perplexity(value: Any) -> dict[str, Any]:
    """A line's perplexity as a separate judgement, negated because higher is better."""
    columns = {"kind": "reward", "aspect": "perplexity"}
    if value is None:
        return {**columns, "status": "failed", "reason": "null in the file"}
    number = finite(value)
    if number is None:
        return {**columns, "status": "unparseable", "reason": "`perplexity` is not a number"}
    return {**columns, "status": "ok", "value": -number}


def _judgement(entry: dict[str, Any], labels: Sequence[str], scores: tuple[float, float]) -> dict[str, Any]:
    kind, missing = "none", None
    if "rewards" in entry or "toxicity" in entry:
        kind, missing = "reward", entry.get("rewards", entry.get("toxicity")) is None
    elif "feedbacks" in entry and "scores" in entry:
        kind, missing = "text", entry["feedbacks"] is None or entry["scores"] is None
    elif "feedbacks" in entry:
        kind, missing = "category", entry["feedbacks"] is None
    status = entry.get("statuses")
    if status in STATUSES and status != "ok":
        return {
            "kind": kind,
            "status": status,
            "reason": str(entry.get("reasons") or "no reason in the file"),
        }
    if missing is None:
        return {"kind": kind, "status": "skipped", "reason": "the file holds no feedback"}
    if missing:
        return {"kind": kind, "status": "failed", "reason": "null in the file"}
    problem, value = None, None
    if kind in ("reward", "text"):
        name = "scores" if kind == "text" else "rewards" if "rewards" in entry else "toxicity"
        value = finite(entry[name])
        if value is None:
            problem = f"`{name}` is not a number"
        elif kind == "text" and not scores[0] <= value <= scores[1]:
            problem = f"{value:g} is outside {scores[0]:g} to {scores[1]:g}"
        elif name == "toxicity":
            value = 1.0 - value  # higher is better
    text = entry.get("feedbacks")
    if kind != "reward" and not problem and not (isinstance(text, str) and text.strip()):
        problem = "`feedbacks` is blank or not text"
    elif isinstance(text, str):
        text = mended(text)
    label = match_label(text, labels) if kind == "category" and isinstance(text, str) else None
    if kind == "category" and not problem and label is None:
        problem = f"not one of the labels: {text!r}"
    if problem:
        return {"kind": kind, "status": "unparseable", "reason": problem}
    columns = {"value": value, "label": label, "text": text if kind == "text" else None}
    return {"kind": kind, "status": "ok", **columns}


def write_alt(path: Path, samples: pl.DataFrame, feedback: pl.DataFrame) -> Exported:
    """Writes feedback of one aspect as an ALT file; judgements that are not ok become null, with their status.

    Args:
        samples: sample_id, prompt, text.
        feedback: rows of FEEDBACK: kind reward, rating (as rewards), text or category.
    """
    kind = one_aspect(feedback, ("reward", "rating", "text", "category"), "ALT")
    lines: dict[str, dict[str, list[Any]]] = {}
    for row in judged_samples(samples, feedback):
        entry = {"generations": row["response"]}
        if kind in ("reward", "rating"):
            entry["rewards"] = row["value"]
        else:
            entry["feedbacks"] = row["text"] if kind == "text" else row["label"]
        if kind == "text":
            whole = row["value"] is not None and row["value"].is_integer()
            entry["scores"] = int(row["value"]) if whole else row["value"]
        _add(lines, row, entry)
    return _written(path, lines)


def write_alt_toxicity(
    path: Path, samples: pl.DataFrame, feedback: pl.DataFrame, *, negated: bool = False
) -> Exported:
    """Writes rewards as an ALT toxicity file: ``generations: [{"text", "toxicity"}]``.

    Args:
        samples: sample_id, prompt, text.
        feedback: rows of FEEDBACK of kind reward.
        negated: whether values are minus the toxicity, as from our scorers; otherwise they are 1 - toxicity, as
            in ALT's rewards (and files imported from ALT).

    Raises:
        ValueError: a value is neither.
    """
    one_aspect(feedback, ("reward",), "ALT's toxicity")
    lines: dict[str, dict[str, list[Any]]] = {}
    for row in judged_samples(samples, feedback):
        toxicity = None if row["value"] is None else (0 if negated else 1) - row["value"]
        if toxicity is not None and not 0 <= toxicity <= 1:
            raise ValueError(
                f"a value of {row['value']:g} is not a toxicity from 0 to 1; use --stage feedback to write rewards"
            )
        _add(lines, row, {"generations": {"text": row["response"], "toxicity": toxicity}})
    return _written(path, lines)


def _add(lines: dict[str, dict[str, list[Any]]], row: dict[str, Any], entry: dict[str, Any]) -> None:
    """Adds a sample to its prompt's line."""
    entry |= {"sample_ids": row["sample_id"], "statuses": row["status"], "reasons": row["reason"]}
    line = lines.setdefault(row["prompt"], {})
    for name, value in entry.items():
        line.setdefault(name, []).append(value)


def _written(path: Path, lines: dict[str, dict[str, list[Any]]]) -> Exported:
    write_file(path, json_text({"prompt": prompt, **line} for prompt, line in lines.items()))
    return exported(len(lines), Counter())
