"""Prompts of a task from a dataset: on the hub, in files of the same schema, or a small embedded one.

A subclass of :class:`DatasetTask` says what it reads of a row and what makes a row unusable; files,
splits, refused rows and caching are the same for all.
"""

from __future__ import annotations

import gzip
import json
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import polars as pl
from pydantic import Field, model_validator

from textalign_dagster.ids import content_hash
from textalign_dagster.prompts import COLUMNS
from textalign_dagster.settings import Settings, SettingsError
from textalign_dagster.tasks.base import Task

Split = Literal["train", "evaluation"]
FORMATS = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
_GLOB = re.compile(r"[*?/\[.]")


class BadRow(ValueError):
    """Why a row is no prompt, in the same words for all rows alike: they are counted by it."""


@dataclass(frozen=True)
class Row:
    """What a task reads of a row."""

    prompt: str
    reference: str | None = None
    may_be_held_out: bool = True
    """Whether ``held_out`` may choose it for the evaluation."""


class Dataset(Settings):
    """Where a task's prompts come from; without `hub` and `path`: the embedded sample."""

    hub: str | None = Field(None, description="A dataset on the hub, as owner/name.")
    revision: str | None = Field(
        None, description="Branch, tag or commit of the hub's dataset; the commit is recorded either way."
    )
    path: str | None = Field(
        None,
        description="A .jsonl, .jsonl.gz, .csv or .parquet file, or a folder of such, in the schema of the "
        "hub's dataset; relative to the experiment file.",
    )
    train: str = Field(
        "train",
        description="The files of the training prompts: a word of their path (`train`), or a pattern such "
        "as `harmless-*/train*`. Where no path has the word of any split, all files are for training.",
    )
    evaluation: str = Field("test", description="The files of the held-out prompts, named like `train`.")
    held_out: int | None = Field(
        None,
        ge=1,
        description="For datasets without a split of their own: so many of the training prompts, chosen by "
        "a hash of their text, are held out for the evaluation.",
    )
    columns: dict[str, str] = Field(
        {}, description="What the task reads → the column it is in, where it is another; `a.b` is nested."
    )
    max_refused: float = Field(
        0.01,
        ge=0,
        le=1,
        description="Share of rows that may be unusable (blank, twice, …) and left out; more is an error.",
    )

    @model_validator(mode="after")
    def _one_source(self) -> Dataset:
        if self.hub is not None and self.path is not None:
            raise ValueError("hub and path are two sources; remove one of them")
        if self.hub is not None and self.hub.count("/") != 1:
            raise ValueError(f"hub: {self.hub!r} is no owner/name")
        if self.revision is not None and self.hub is None:
            raise ValueError("revision is that of a hub's dataset; add hub, or remove it")
        if self.held_out is not None and self.hub is None and self.path is None:
            raise ValueError("held_out is for a hub or a path; the embedded sample has held-out prompts")
        return self


class DatasetTask(Task):
    """A task whose prompts are rows of a dataset."""

    data: Dataset = Field(Dataset(), description="Where the prompts come from.")

    mixed_evaluation: ClassVar[bool] = False
    """Whether the held-out prompts are put in an order by a hash: an evaluation takes the first ones, and
    some sources list one kind after the other."""

    @model_validator(mode="after")
    def _known_columns(self) -> Self:
        unknown = sorted(set(self.data.columns) - set(self.columns))
        if unknown:
            raise ValueError(
                f"data.columns: {', '.join(unknown)} is nothing the task reads; it reads {', '.join(self.columns)}"
            )
        return self

    # Settings with a mapping in them have no hash of their own, and loading is cached by the task.
    def __hash__(self) -> int:
        return hash(self.model_dump_json())

    @property
    def identity(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"data"})

    @property
    @abstractmethod
    def embedded(self) -> Path:
        """The folder of the embedded sample: train.jsonl and evaluation.jsonl."""

    @property
    @abstractmethod
    def columns(self) -> Mapping[str, tuple[str, ...]]:
        """What :meth:`row` reads → the columns where it may be; the first that a row has counts."""

    @abstractmethod
    def row(self, values: Mapping[str, Any]) -> Row:
        """A row as a prompt.

        Args:
            values: what :attr:`columns` names; None where the row has none of those columns.

        Raises:
            BadRow: it is none.
        """

    def prompts(self, split: Split) -> pl.DataFrame:
        return self._loaded(split).prompts

    @property
    def notes(self) -> tuple[str, ...]:
        loaded = [self._loaded("train")]
        if _files(self.data, self.embedded).of("evaluation"):
            loaded.append(self._loaded("evaluation"))
        return tuple(part.note for part in loaded if part.note)

    def _loaded(self, split: Split) -> Loaded:
        """
        Raises:
            SettingsError: the dataset cannot be had, read or used; names field and remedy.
        """
        files = _files(self.data, self.embedded)
        if not files.of(split):
            raise SettingsError(
                f"task.data.{split}: no file of {files.source} is for {getattr(self.data, split)!r} "
                f"(there are: {_some(files.names)}); name others"
                + (", or hold prompts out with `held_out`" if split == "evaluation" else "")
            )
        return _load(self, split, files)


@dataclass(frozen=True)
class Loaded:
    """The prompts of a split, and what was left out of it."""

    prompts: pl.DataFrame
    note: str | None


@dataclass(frozen=True)
class Files:
    """The files of a dataset as they were at one time: (path, name, time of change, size)."""

    source: str
    revision: str | None
    train: tuple[tuple[Path, str, int, int], ...]
    evaluation: tuple[tuple[Path, str, int, int], ...]
    names: tuple[str, ...]

    def of(self, split: Split) -> tuple[tuple[Path, str, int, int], ...]:
        return self.train if split == "train" else self.evaluation


def _files(data: Dataset, embedded: Path) -> Files:
    """The files behind the settings, by split."""
    if data.hub is not None:
        folder, source = _from_hub(data), data.hub
        revision = folder.name  # snapshots are named by their commit
    elif data.path is not None:
        folder, source, revision = Path(data.path), Path(data.path).name, None
    else:
        folder, source, revision = embedded, f"embedded sample of {embedded.parent.name}", None
    if folder.is_file():
        found = {folder.name: folder}
    elif folder.is_dir():
        paths = (path for path in folder.rglob("*") if path.name.endswith(FORMATS) and path.is_file())
        found = {path.relative_to(folder).as_posix(): path for path in sorted(paths)}
    else:
        raise SettingsError(f"task.data.path: {folder}: no such file or folder")
    if not found or not all(name.endswith(FORMATS) for name in found):
        raise SettingsError(f"task.data: {folder} has no file that ends in {', '.join(FORMATS)}")
    splits = ("train", "evaluation") if folder == embedded else (data.train, data.evaluation)
    train, evaluation = ([name for name in found if _is_of(name, split)] for split in splits)
    if folder.is_file() or (not train and not evaluation and not _GLOB.search(data.train)):
        train, evaluation = list(found), []
    if data.held_out is not None:
        evaluation = train
    stamps = {name: (path, name, *_stamp(path)) for name, path in found.items()}
    return Files(
        source,
        revision,
        tuple(stamps[name] for name in train),
        tuple(stamps[name] for name in evaluation),
        tuple(found),
    )


def _stamp(path: Path) -> tuple[int, int]:
    facts = path.stat()
    return facts.st_mtime_ns, facts.st_size


def _is_of(name: str, split: str) -> bool:
    if _GLOB.search(split):
        return fnmatch(name, split)
    return re.search(rf"(?<![a-z0-9]){re.escape(split)}(?![a-z0-9])", name, re.IGNORECASE) is not None


def _from_hub(data: Dataset) -> Path:
    assert data.hub is not None
    names = (data.train, data.evaluation) if data.held_out is None else (data.train,)
    patterns = names if all(map(_GLOB.search, names)) else tuple(f"*{ending}" for ending in FORMATS)
    return _snapshot(data.hub, data.revision, patterns)


@lru_cache(maxsize=16)  # one process sees one commit, and asks the hub once
def _snapshot(hub: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    # Imported here: only hub datasets need it, and loading the code location must stay light.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(hub, repo_type="dataset", revision=revision, allow_patterns=list(patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise SettingsError(
            f"task.data.hub: {hub} cannot be had from the hub ({type(error).__name__}); check the name, the "
            "revision, the network and your login, or give local files in `path`"
        ) from None
    return Path(folder)


@dataclass
class _Refused:
    """Rows left out, counted by reason, each with its first place and content."""

    reasons: dict[str, tuple[int, str]] = field(default_factory=dict)

    def add(self, reason: str, place: str, shown: Any = None) -> None:
        count, first = self.reasons.get(reason, (0, place if shown is None else f"{place}: {_short(shown)}"))
        self.reasons[reason] = count + 1, first

    @property
    def count(self) -> int:
        return sum(count for count, _ in self.reasons.values())

    def __str__(self) -> str:
        return "; ".join(f"{count} × {reason} ({first})" for reason, (count, first) in self.reasons.items())


@lru_cache(maxsize=12)
def _load(task: DatasetTask, split: Split, files: Files) -> Loaded:
    data, refused = task.data, _Refused()
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
            f"At most {data.max_refused:.3g} of them may be (task.data.max_refused): mend the rows, name the "
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


def _split(rows: Sequence[Row], held_out: int, split: Split) -> list[Row]:
    """The rows of a split where the dataset has none; the order of its rows does not matter."""
    eligible = sorted(
        (row.prompt for row in rows if row.may_be_held_out), key=lambda text: content_hash("held out", text)
    )
    if len(eligible) < held_out or held_out >= len(rows):
        raise SettingsError(
            f"task.data.held_out: {held_out} wanted of {len(rows)} prompts, of which {len(eligible)} may be "
            "held out, and some must remain; lower it"
        )
    chosen = set(eligible[:held_out])
    return [row for row in rows if (row.prompt in chosen) == (split == "evaluation")]


def _rows(
    task: DatasetTask, files: Sequence[tuple[Path, str, int, int]], other: set[str], refused: _Refused
) -> tuple[list[Row], int, list[str]]:
    """The usable rows, how many there were in all, and the columns of the first."""
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
        for number, values in _read(path, tops):
            total, place = total + 1, f"{name}, row {number}"
            if values is None:
                refused.add("not JSON, or no object", place)
                continue
            fields = fields or list(values)
            found = {key: _value(values, places) for key, places in columns.items()}
            try:
                row = task.row(found)
                if not row.prompt.strip():
                    raise BadRow("a blank prompt")
            except BadRow as error:
                refused.add(str(error), place, found)
                continue
            if row.prompt in seen:
                refused.add("the same prompt again", place, row.prompt)
            elif row.prompt in other:
                refused.add("the prompt is among the held-out ones", place, row.prompt)
            else:
                kept.append(row)
            seen.add(row.prompt)
    return kept, total, fields


def _value(values: Mapping[str, Any], places: Sequence[str]) -> Any:
    """The first of the places that the row has, None without one."""
    for place in places:
        found: Any = values
        for step in place.split("."):
            found = found.get(step) if isinstance(found, Mapping) else None
        if found is not None:
            return found
    return None


def _read(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The rows of a file with their numbers; None for a line that is no JSON object.

    Raises:
        SettingsError: the file cannot be read.
    """
    try:
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _read_jsonl(path)
            return
        lazy = pl.scan_parquet(path) if path.suffix == ".parquet" else pl.scan_csv(path, infer_schema=False)
        known = lazy.collect_schema().names()
        frame = lazy.select([name for name in known if name in columns] or known[:1]).collect()
        blank = dict.fromkeys(known)  # so that errors can tell what there is
        for number, values in enumerate(frame.iter_rows(named=True), start=1):
            yield number, blank | values
    except UnicodeDecodeError as error:
        raise SettingsError(f"task.data: {path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except (pl.exceptions.PolarsError, OSError, EOFError) as error:
        problem = str(error).strip().splitlines() or [type(error).__name__]
        raise SettingsError(f"task.data: {path}: cannot be read: {problem[0]}") from None


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    opened: Callable[..., Any] = gzip.open if path.suffix == ".gz" else Path.open
    with opened(path, "rt", encoding="utf-8-sig", newline="\n") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except json.JSONDecodeError:
                values = None
            yield number, values if isinstance(values, dict) else None


def _short(value: Any, limit: int = 80) -> str:
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}…"


def _some(names: Sequence[str], show: int = 8) -> str:
    more = f" and {len(names) - show} more" if len(names) > show else ""
    return ", ".join(names[:show]) + more if names else "none"


def text_of(values: Mapping[str, Any], name: str) -> str:
    """A text that the row must have.

    Raises:
        BadRow: it is missing, no text or blank.
    """
    found = values[name]
    if found is None:
        raise BadRow(f"no {name}")
    if not isinstance(found, str):
        raise BadRow(f"{name} is no text")
    if not found.strip():
        raise BadRow(f"a blank {name}")
    return found


def optional_text_of(values: Mapping[str, Any], name: str) -> str | None:
    """A text that the row may have; None for a missing or blank one.

    Raises:
        BadRow: it is no text.
    """
    found = values[name]
    if found is not None and not isinstance(found, str):
        raise BadRow(f"{name} is no text")
    return found if found and found.strip() else None
