"""Feedback that people or other programs wrote into a file, matched to the samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from resources.rewards.rows import SCORED, ScoringError, ordered
from textalign_dagster.feedback_files.formats import read_feedback
from textalign_dagster.feedback_files.imported import Imported, of_aspect
from textalign_dagster.scorers import ImportedScorer
from textalign_dagster.scorers.matching import match_judgements
from textalign_dagster.settings import SettingsError


def from_file(
    scorer: ImportedScorer, samples: pl.DataFrame, iteration: int | None, facts: dict[str, Any]
) -> pl.DataFrame:
    try:
        path = scorer.file(iteration)
    except ValueError as error:
        raise ScoringError(f"scorer imported: path: {error}") from None
    if not path.is_file():
        raise ScoringError(_how_to_annotate(path, iteration, scorer.format))
    options = {
        name: getattr(scorer, name) for name in ("labels", "scores") if getattr(scorer, name) is not None
    }
    try:
        found = read_feedback(path, scorer.format, **options)
    except SettingsError as error:
        raise ScoringError(f"scorer imported: {error}") from None
    if found.refused and not scorer.skip_refused:
        raise ScoringError(
            f"scorer imported: {path}: {len(found.refused)} of {found.rows} rows cannot be read; fix them, or set "
            f"skip_refused\n{found.summary()}"
        )
    judgements = _one_aspect(scorer, path, found)
    rows = match_judgements(samples, found.samples, judgements, scorer.kind)
    matched = sum(row["reason"] != "no judgement in the file" for row in rows)
    if not matched:
        raise ScoringError(
            f"scorer imported: {path} judges none of the {len(rows)} samples (by sample_id, or prompt and text); is "
            "it the file of another iteration or seed?"
        )
    facts |= {"judgements": judgements.height, "matched": matched}
    frame = pl.DataFrame(
        rows, {name: SCORED[name] for name in ("value", "label", "text", "status", "reason")}
    )
    return ordered(frame.with_columns(sample_id=samples["sample_id"], score="value"))


def _one_aspect(scorer: ImportedScorer, path: Path, found: Imported) -> pl.DataFrame:
    if scorer.aspect is not None and found.feedback.is_empty():
        raise ScoringError(f"scorer imported: {path} has no aspect {scorer.aspect!r}; it has: none")
    if found.feedback.is_empty():
        raise ScoringError(f"scorer imported: {path} holds no judgement of a single response")
    try:
        return of_aspect(found.feedback, scorer.aspect, path)
    except ValueError as error:
        raise ScoringError(f"scorer imported: {error}") from None


def _how_to_annotate(path: Path, iteration: int | None, format_name: str) -> str:
    k = "K" if iteration is None else str(iteration)
    return (
        f"scorer imported: {path} does not exist yet. Export the samples with `textalign export EXPERIMENT "
        f"samples.jsonl -k {k}`, have them judged (one row each: sample_id, prompt, response, and value, label or "
        f"feedback), save that as {path} in the format {format_name}, and run the experiment again: it continues from here."
    )
