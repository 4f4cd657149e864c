"""Prompts of a task from a dataset: on the hub, in files of the same schema, or a small embedded one.

A subclass of :class:`DatasetTask` defines what it reads from a row and what makes a row unusable; files,
splits, refused rows and caching are the same for all.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Self

import polars as pl
from pydantic import Field, model_validator

from textalign_dagster.ids import content_hash
from textalign_dagster.prompts import COLUMNS, held_out
from textalign_dagster.settings import SettingsError
from textalign_dagster.tasks.base import Task
from textalign_dagster.tasks.dataset_files import Files, Split, files_of, read_rows
from textalign_dagster.tasks.dataset_rows import BadRow, Refused, Row, value_at
from textalign_dagster.tasks.dataset_settings import Dataset


class DatasetTask(Task):
    """A task whose prompts are rows of a dataset."""

    data: Dataset = Field(Dataset(), description="Where the prompts come from.")

    mixed_evaluation: ClassVar[bool] = False
    """Whether the held-out prompts are ordered by a hash, because an evaluation takes the first ones and some
    sources list one kind after the other."""

    @model_validator(mode="after")
    def _known_columns(self) -> Self:
        unknown = sorted(set(self.data.columns) - set(self.columns))
        if unknown:
            raise ValueError(
                f"data.columns: the task does not read {', '.join(unknown)}; it reads {', '.join(self.columns)}"
            )
        return self

    # Settings that contain a mapping are not hashable, and loading is cached by task.
    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def identity(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"data"})

    @property
    def embedded(self) -> Path:
        """The folder of the embedded sample, next to the task's module: train.jsonl and evaluation.jsonl."""
        return Path(inspect.getfile(type(self))).with_name("data")

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, tuple[str, ...]]:
        """What :meth:`row` reads → the columns where it can be; the first one in a row counts."""

    @abstractmethod
    def row(self, values: Mapping[str, Any]) -> Row:
        """A row as a prompt.

        Args:
            values: the names in :attr:`columns`; None where the row has none of those columns.

        Raises:
            BadRow: it cannot be used as one.
        """

    def prompts(self, split: Split) -> pl.DataFrame:
        return self._loaded(split).prompts

    @property
    def notes(self) -> tuple[str, ...]:
        loaded = [self._loaded("train")]
        if files_of(self.data, self.embedded).of("evaluation"):
            loaded.append(self._loaded("evaluation"))
        return tuple(part.note for part in loaded if part.note)

    def _loaded(self, split: Split) -> Loaded:
        """
        Raises:
            SettingsError: the dataset is unavailable, unreadable or unusable; the message names field and remedy.
        """
        files = files_of(self.data, self.embedded)
        if not files.of(split):
            raise SettingsError(
                f"task.data.{split}: no file of {files.source} matches {getattr(self.data, split)!r} "
                f"(it has: {_some(files.names)}); name others"
                + (", or hold prompts out with `held_out`" if split == "evaluation" else "")
            )
        return _load(self, split, files)


@dataclass(frozen=True)
class Loaded:
    """The prompts of a split, and what was left out of it."""

    prompts: pl.DataFrame
    note: str | None


@lru_cache(maxsize=12)
def _load(task: DatasetTask, split: Split, files: Files) -> Loaded:
    data, refused = task.data, Refused()
    other: set[str] = set()
    if split == "train" and data.held_out is None and files.evaluation:
        other = set(_load(task, "evaluation", files).prompts["prompt"])
    rows, total, fields = _rows(task, files.of(split), other, refused)
    note = None
    if refused.count:
        note = f"{files.source}, {split}: {refused.count} of {total} rows left out: {refused}"
    if refused.count > data.max_refused * total or not rows:
        raise SettingsError(
            f"task.data: {note or f'{files.source}, {split}: there are no rows'}. "
            f"At most {data.max_refused:.3g} of them may be (task.data.max_refused): fix the rows, name the "
            f"right columns in task.data.columns (there are: {_some(fields)}), or raise the limit"
        )
    if data.held_out is not None:
        rows = _split(rows, data.held_out, split)
    if split == "evaluation" and task.mixed_evaluation:
        rows = sorted(rows, key=lambda row: content_hash("evaluation order", row.prompt))
    prompts, references = [row.prompt for row in rows], [row.reference for row in rows]
    frame = pl.DataFrame(
        {"prompt": prompts, "reference": references}, {"prompt": pl.String, "reference": pl.String}
    ).with_columns(
        source=pl.lit(files.source),
        source_revision=pl.lit(files.revision or content_hash("prompts", prompts)),
    )
    return Loaded(frame.select(COLUMNS), note)


def _split(rows: Sequence[Row], count: int, split: Split) -> list[Row]:
    """The rows of a split of a dataset without splits; the order of its rows does not matter."""
    eligible = [row.prompt for row in rows if row.may_be_held_out]
    if len(eligible) < count or count >= len(rows):
        raise SettingsError(
            f"task.data.held_out: {count} requested of {len(rows)} prompts, of which {len(eligible)} may be "
            "held out, and some must remain; lower it"
        )
    chosen = held_out(eligible, count)
    return [row for row in rows if (row.prompt in chosen) == (split == "evaluation")]


def _rows(
    task: DatasetTask, files: Sequence[tuple[Path, str, int, int]], other: set[str], refused: Refused
) -> tuple[list[Row], int, list[str]]:
    """The usable rows, the total number of rows, and the columns of the first."""
    columns = {
        name: (task.data.columns[name],) if name in task.data.columns else places
        for name, places in task.columns.items()
    }
    tops = sorted({place.partition(".")[0] for places in columns.values() for place in places})
    kept: list[Row] = []
    seen: set[str] = set()
    total = 0
    fields: list[str] = []
    for path, name, _, _ in files:
        for number, values in read_rows(path, tops):
            total, place = total + 1, f"{name}, row {number}"
            if values is None:
                refused.add("not a JSON object", place)
                continue
            fields = fields or list(values)
            found = {key: value_at(values, places) for key, places in columns.items()}
            try:
                row = task.row(found)
                if not row.prompt.strip():
                    raise BadRow("a blank prompt")
            except BadRow as error:
                refused.add(str(error), place, found)
                continue
            if row.prompt in seen:
                refused.add("a duplicate prompt", place, row.prompt)
            elif row.prompt in other:
                refused.add("the prompt is among the held-out ones", place, row.prompt)
            else:
                kept.append(row)
            seen.add(row.prompt)
    return kept, total, fields


def _some(names: Sequence[str], show: int = 8) -> str:
    more = f" and {len(names) - show} more" if len(names) > show else ""
    return ", ".join(names[:show]) + more if names else "none"
