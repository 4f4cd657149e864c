"""ALT's files of every stage, to and from the tables, for ``textalign export`` and ``import``."""

from __future__ import annotations

from pathlib import Path

from resources.store import Artifact, ArtifactStore
from textalign_dagster.experiment import Experiment
from textalign_dagster.feedback_files.alt import write_alt_toxicity
from textalign_dagster.feedback_files.alt_prompts import (
    ImportedPrompts,
    write_alt_prompts,
    write_alt_samples,
)
from textalign_dagster.feedback_files.exported import Exported, write_file
from textalign_dagster.feedback_files.json_records import json_text
from textalign_dagster.settings import SettingsError


def export_alt(
    store: ArtifactStore, name: str, experiment: Experiment, iteration: int, stage: str, path: Path
) -> Exported:
    """Writes prompts, samples or toxicity of an iteration in ALT's format.

    Raises:
        SettingsError: the iteration has not reached that stage.
        ValueError: the feedback is not a toxicity from 0 to 1.
    """
    if stage == "prompts":
        return write_alt_prompts(
            path, _artifact(store, name, iteration, "prompt_draws").frame("prompt_draws")
        )
    samples = _artifact(store, name, iteration, "generations").frame("generations")
    if stage == "samples":
        return write_alt_samples(path, samples, experiment.method.template)
    feedback = _artifact(store, name, iteration, "feedback").frame("feedback")
    scorer = experiment.sample_scorer
    negated = scorer is not None and scorer.better == "lower"
    return write_alt_toxicity(path, samples, feedback, negated=negated)


def write_prompts(target: Path, found: ImportedPrompts) -> Exported:
    """Writes imported prompts as a file that ``prompts.path`` reads.

    Raises:
        SettingsError: the target has another suffix, or there are no prompts.
    """
    if found.prompts.is_empty():
        raise SettingsError(f"{target}: not written: no prompt was imported")
    # Columns without any values are left out.
    kept = found.prompts.select(
        c for c in found.prompts.columns if found.prompts[c].null_count() < found.prompts.height
    )
    if target.suffix == ".parquet":
        target.parent.mkdir(parents=True, exist_ok=True)
        kept.write_parquet(target)
    elif target.suffix == ".jsonl":
        rows = ({k: v for k, v in row.items() if v is not None} for row in kept.iter_rows(named=True))
        write_file(target, json_text(rows))
    else:
        raise SettingsError(f"{target}: prompt files end in .jsonl or .parquet")
    return Exported(kept.height, {})


def _artifact(store: ArtifactStore, name: str, iteration: int, stage: str) -> Artifact:
    pointer = store.pointer(name, iteration, stage)
    if pointer is None:
        raise SettingsError(f"{name}, iteration {iteration}, has no {stage} yet: textalign run {name}")
    return pointer.artifact
