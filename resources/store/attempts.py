"""Attempts: folders that are being filled, invisible until a manifest names one of them.

An attempt holds a file lock next to its folder for as long as its process lives; the kernel releases
it when the process dies, however it dies. So a process that can take the lock of an attempt that no
manifest names may remove that attempt, without guessing from ages or process ids (which are reused,
and mean nothing across containers).
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl

from resources.store.durable import ArtifactError, make_folder, temporary_name
from resources.store.manifest import check_plain, file_facts
from textalign_dagster.disk import sync
from textalign_dagster.tables import conform

NAME = re.compile(r"\d{8}T\d{6}-[0-9a-f]{8}")
PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*")
ROW_GROUP = 122_880  # rows; fixed, so that equal frames give equal bytes; a multiple of DuckDB's vectors
STALE_SECONDS = 3600  # a temporary name lives for milliseconds


def check_name(name: str, what: str) -> None:
    """Raise `ArtifactError` unless the name is a single plain path component."""
    if not PLAIN.fullmatch(name):
        raise ArtifactError(f"{what} {name!r}: use letters, digits and _ . + = -, not starting with '.'")


class Draft:
    """What a stage fills: tables, folders, facts. It becomes an artifact when the stage returns."""

    def __init__(self, attempt: str, root: Path) -> None:
        self.attempt = attempt
        self.facts: dict[str, Any] = {}
        self._root = root
        self._tables: dict[str, dict[str, Any]] = {}
        self._folders: list[str] = []

    def write(self, table: str, frame: pl.DataFrame, schema: pl.Schema) -> None:
        """Write ``{table}.parquet``: exactly the schema's columns, rows in the order given.

        Raises:
            ValueError: columns missing or unknown (see `conform`).
            ArtifactError: the table has already been written.
        """
        self._new_name(table)
        frame = conform(frame, schema, table)
        path = self._root / f"{table}.parquet"
        temporary = temporary_name(path)
        frame.write_parquet(temporary, compression="zstd", compression_level=3, row_group_size=ROW_GROUP)
        sync(temporary)
        temporary.replace(path)
        columns = {name: str(dtype) for name, dtype in frame.schema.items()}
        self._tables[table] = {"table": table, "rows": frame.height, "columns": columns}

    def folder(self, name: str) -> Path:
        """A local folder to fill with files (a model); the same one when called again."""
        if name not in self._folders:
            self._new_name(name)
            make_folder(self._root / name)
            self._folders.append(name)
        return self._root / name

    def record(self, **facts: Any) -> None:
        """Add facts about the computation (usd, tokens, gpu_seconds, …) to the manifest."""
        check_plain(facts, "facts")
        self.facts.update(facts)

    def seal(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Sync everything to disk; returns the files with their hashes, and the folders' names."""
        files = []
        for table, facts in self._tables.items():
            files.append({**facts, **file_facts(self._root, self._root / f"{table}.parquet")})
        for name in self._folders:
            for path in sorted((self._root / name).rglob("*")):
                if path.is_symlink():
                    raise ArtifactError(
                        f"{path} is a symbolic link: an artifact holds its own files, "
                        "so copy what it points to"
                    )
                sync(path)
                if path.is_file():
                    files.append(file_facts(self._root, path))
            sync(self._root / name)
        sync(self._root)
        return files, sorted(self._folders)

    def _new_name(self, name: str) -> None:
        check_name(name, "table or folder")
        if name in self._tables or name in self._folders:
            raise ArtifactError(
                f"{name!r} was already written in this artifact: use a different name for each part"
            )


class Attempt:
    """An attempt of this process: its folder, and the lock that shows it is alive."""

    def __init__(self, parent: Path) -> None:
        make_folder(parent)
        while True:
            self.name = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
            self._lock_path = parent / f".{self.name}.lock"
            self._lock = _open_lock(self._lock_path, os.O_CREAT)
            if self._lock is not None:
                break  # else: a sweeper took it between creation and locking; take another name
        self.folder = parent / self.name
        make_folder(self.folder)

    def release(self, *, remove: bool) -> None:
        """Release the lock; with ``remove``, after removing the folder."""
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)
        self._lock_path.unlink(missing_ok=True)
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def sweep(parent: Path, published: Callable[[], str | None]) -> list[Path]:
    """Remove what dead processes left in an artifact's folder; returns the removed paths.

    ``published`` reads the attempt that the manifest names. It is called after the lock was taken,
    because the owner may have published before that.
    """
    if not parent.is_dir():
        return []
    entries = {entry.name for entry in parent.iterdir()}
    locked = {e[1:-5] for e in entries if e.startswith(".") and e.endswith(".lock")}
    removed = []
    for name in sorted(n for n in entries | locked if NAME.fullmatch(n)):
        lock_path, folder = parent / f".{name}.lock", parent / name
        lock = _open_lock(lock_path) if lock_path.exists() else None
        if lock is None and lock_path.exists():
            continue  # its process is alive
        if folder.exists() and name != published():
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
        lock_path.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)
    return removed + sweep_temporary(parent, entries)


def living(parent: Path) -> set[str]:
    """The attempts in an artifact's folder whose processes are alive; changes nothing."""
    found = set()
    for path in parent.glob(".*.lock"):
        lock = _open_lock(path)
        if lock is not None:
            os.close(lock)
        elif path.exists() and NAME.fullmatch(path.name[1:-5]):
            found.add(path.name[1:-5])
    return found


def sweep_temporary(folder: Path, names: set[str]) -> list[Path]:
    """Remove temporary files that are too old to be in use; returns their paths."""
    removed = []
    for name in sorted(n for n in names if n.startswith(".") and n.endswith(".tmp")):
        path = folder / name
        if path.exists() and time.time() - path.stat().st_mtime > STALE_SECONDS:
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _open_lock(path: Path, flags: int = 0) -> int | None:
    """The descriptor of an exclusively locked file; None if another process holds or removed it."""
    try:
        handle = os.open(path, os.O_RDWR | flags, 0o644)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), path.stat()):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass  # held by another process, or removed from under us
    except OSError as error:
        os.close(handle)
        raise ArtifactError(
            f"cannot lock {path} ({error.strerror}): the store requires a file system with flock; "
            "mount it with flock, or put the store elsewhere"
        ) from error
    os.close(handle)
    return None
