"""The prompts an experiment reads: from the files it names, else from its task."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import polars as pl

from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.offline import offline_prompts
from textalign_dagster.experiment.policies import base_policy
from textalign_dagster.ids import content_hash
from textalign_dagster.prompts import COLUMNS, read_prompt_file
from textalign_dagster.settings import SettingsError
from textalign_dagster.tasks import Task


def training_prompts(experiment: Experiment) -> pl.DataFrame:
    """The prompts iterations draw from: prompt, reference, source, source_revision.

    Raises:
        SettingsError: the file cannot be used; the message says why.
    """
    path, task = experiment.prompts.path, task_of(experiment)
    if experiment.offline is not None:
        return offline_prompts(experiment, task)[0]
    return _file(task, path) if path is not None else task.prompts("train")


def held_out_prompts(experiment: Experiment) -> pl.DataFrame:
    """The prompts policies are measured on, with the columns of :func:`training_prompts`."""
    path, task = experiment.evaluation.path, task_of(experiment)
    if path is None and experiment.offline is not None and experiment.offline.held_out is not None:
        return offline_prompts(experiment, task)[1]
    return _file(task, path) if path is not None else task.prompts("evaluation")


def written_prompts(experiment: Experiment) -> dict[str, str]:
    """The held-out prompts as shown to a policy → as written in `evaluation.path`; empty without that file."""
    path = experiment.evaluation.path
    if path is None:
        return {}
    written = read_prompt_file(Path(path))["prompt"]
    return dict(zip(held_out_prompts(experiment)["prompt"], written, strict=True))


def task_of(experiment: Experiment) -> Task:
    """The experiment's task, set up for the policy that reads its prompts.

    Raises:
        SettingsError: the task needs something that the policy lacks.
    """
    return experiment.task.for_policy(lambda: base_policy(experiment).path)


def source_hash(prompts: pl.DataFrame) -> str:
    """Hash of the prompts, for the keys of artifacts made from them; order matters."""
    return _hashed(_Same(prompts))


@dataclass(frozen=True, eq=False)
class _Same:
    """A frame compared by identity: 100,000 prompts take a second to hash, and every cell needs the hash."""

    frame: pl.DataFrame

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.frame is other.frame

    def __hash__(self) -> int:
        return id(self.frame)


@lru_cache(maxsize=16)
def _hashed(prompts: _Same) -> str:
    return content_hash("prompts", [list(row) for row in prompts.frame.select(COLUMNS).iter_rows()])


def _file(task: Task, path: str) -> pl.DataFrame:
    file = Path(path)
    try:
        facts = file.stat()
    except OSError:
        return read_prompt_file(file)  # reports what is wrong with it
    return _read(task, file, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=16)
def _read(task: Task, path: Path, modified: int, size: int) -> pl.DataFrame:
    """The file at that time and size, as the task reads it; cached, because the grid's states read it often."""
    prompts = read_prompt_file(path)
    cleaned: dict[str, int] = {}
    for number, prompt in enumerate(prompts["prompt"], start=1):
        try:
            text = task.cleaned(prompt)
        except ValueError as error:
            raise SettingsError(f"{path}: row {number}: task {task.name} cannot use it: {error}") from None
        if text in cleaned:
            raise SettingsError(
                f"{path}: rows {cleaned[text]} and {number} are the same prompt as task {task.name} reads "
                "them; keep one of them"
            )
        cleaned[text] = number
    return prompts.with_columns(prompt=pl.Series(list(cleaned), dtype=pl.String))
