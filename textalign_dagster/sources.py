"""The prompts an experiment reads: from the files it names, else from its task."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import polars as pl

from textalign_dagster.experiment import Experiment
from textalign_dagster.ids import content_hash
from textalign_dagster.prompts import COLUMNS, read_prompt_file


def training_prompts(experiment: Experiment) -> pl.DataFrame:
    """The prompts iterations draw from: prompt, reference, source, source_revision.

    Raises:
        SettingsError: the file cannot be used; says why.
    """
    path = experiment.prompts.path
    return _file(path) if path is not None else experiment.task.prompts("train")


def held_out_prompts(experiment: Experiment) -> pl.DataFrame:
    """The prompts policies are measured on, with the columns of :func:`training_prompts`."""
    path = experiment.evaluation.path
    return _file(path) if path is not None else experiment.task.prompts("evaluation")


def source_hash(prompts: pl.DataFrame) -> str:
    """What the prompts are, for the keys of artifacts made from them; their order counts."""
    return content_hash("prompts", [list(row) for row in prompts.select(COLUMNS).iter_rows()])


def _file(path: str) -> pl.DataFrame:
    file = Path(path)
    try:
        facts = file.stat()
    except OSError:
        return read_prompt_file(file)  # says what is wrong with it
    return _read(file, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=16)
def _read(path: Path, modified: int, size: int) -> pl.DataFrame:
    """The file as it was at that time: the grid's states ask for it again and again."""
    return read_prompt_file(path)
