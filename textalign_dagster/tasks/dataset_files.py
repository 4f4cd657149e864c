"""The files of a dataset, by split, and the rows in them."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import polars as pl

from textalign_dagster.hub import snapshot
from textalign_dagster.settings import SettingsError
from textalign_dagster.tasks.dataset_settings import Dataset

Split = Literal["train", "evaluation"]
FORMATS = (".jsonl", ".jsonl.gz", ".csv", ".parquet")
SINGLE = (*FORMATS, ".json")
"""Suffixes of a single named file; the .json files in a folder can be anything."""
_GLOB = re.compile(r"[*?/\[.]")


@dataclass(frozen=True)
class Files:
    """The files of a dataset at one time: (path, name, modification time, size)."""

    source: str
    revision: str | None
    train: tuple[tuple[Path, str, int, int], ...]
    evaluation: tuple[tuple[Path, str, int, int], ...]
    names: tuple[str, ...]

    def of(self, split: Split) -> tuple[tuple[Path, str, int, int], ...]:
        return self.train if split == "train" else self.evaluation


def files_of(data: Dataset, embedded: Path) -> Files:
    """The files that the settings select, by split."""
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
    if not found or not all(name.endswith(SINGLE) for name in found):
        raise SettingsError(f"task.data: {folder} has no file that ends in {', '.join(SINGLE)}")
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


@lru_cache(maxsize=16)  # one process sees one commit, and queries the hub once
def _snapshot(hub: str, revision: str | None, patterns: tuple[str, ...]) -> Path:
    return snapshot(
        "task.data.hub", hub, revision, patterns, kind="dataset", instead="give local files in `path`"
    )


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """The rows of a file with their numbers; None for a line that is not a JSON object.

    Raises:
        SettingsError: the file cannot be read.
    """
    try:
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _read_jsonl(path)
            return
        if path.suffix == ".json":
            yield from _read_json(path)
            return
        lazy = pl.scan_parquet(path) if path.suffix == ".parquet" else pl.scan_csv(path, infer_schema=False)
        known = lazy.collect_schema().names()
        frame = lazy.select([name for name in known if name in columns] or known[:1]).collect()
        blank = dict.fromkeys(known)  # so that errors can list the columns
        for number, values in enumerate(frame.iter_rows(named=True), start=1):
            yield number, blank | values
    except UnicodeDecodeError as error:
        raise SettingsError(f"task.data: {path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except (pl.exceptions.PolarsError, OSError, EOFError) as error:
        problem = str(error).strip().splitlines() or [type(error).__name__]
        raise SettingsError(f"task.data: {path}: cannot be read: {problem[0]}") from None


def _read_json(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise SettingsError(f"task.data: {path}:{error.lineno}: broken JSON: {error.msg}") from None
    if not isinstance(rows, list):
        raise SettingsError(f"task.data: {path}: not a JSON list of rows")
    for number, values in enumerate(rows, start=1):
        yield number, values if isinstance(values, dict) else None


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
