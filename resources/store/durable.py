"""Durable files: synced to disk, whole or absent; and readable errors when that fails."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from textalign_dagster.disk import sync

FULL = {errno.ENOSPC, errno.EDQUOT}


class ArtifactError(Exception):
    """An artifact cannot be written, read or trusted; the message names file and remedy."""


def full_disk(error: BaseException) -> bool:
    """Whether an error means that a disk or a quota is full, including as reported by polars and others."""
    if isinstance(error, OSError):
        return error.errno in FULL
    if type(error).__module__.startswith("sqlalchemy"):  # Dagster's run history
        return any(text in str(error) for text in ("disk I/O error", "database or disk is full"))
    from_writer = type(error).__module__.split(".")[0] in ("polars", "pyarrow", "safetensors_rust")
    return from_writer and any(f"os error {code}" in str(error) for code in FULL)


def full_disk_error(root: Path, error: BaseException | None = None) -> ArtifactError:
    """The error for a full disk, with the space left on it; ``error`` may name another disk."""
    named = error.filename if isinstance(error, OSError) else None
    place = root if named is None or root in Path(os.fsdecode(named)).parents else Path(os.fsdecode(named))
    free = ""
    with contextlib.suppress(OSError):
        folder = place if place.is_dir() else place.parent
        free = f" ({shutil.disk_usage(folder).free / 2**20:.1f} MiB left)"
    return ArtifactError(
        f"no space left on {place}{free}: free some space and run again; nothing was published"
    )


@contextlib.contextmanager
def readable_errors(root: Path, path: Path, doing: str) -> Iterator[None]:
    """Turn the operating system's errors into an `ArtifactError` with the path and the remedy."""
    try:
        yield
    except OSError as error:
        if full_disk(error):
            raise full_disk_error(root, error) from error
        raise ArtifactError(
            f"cannot {doing} {path}: {error.strerror or error}; check the store's path and its permissions"
        ) from error


def make_folder(path: Path) -> None:
    """Create a folder and its parents so that they survive a power cut."""
    if path.is_dir():
        return
    make_folder(path.parent)
    path.mkdir(exist_ok=True)
    sync(path.parent)


def write_durably(path: Path, data: bytes) -> None:
    """Write a whole file and sync it to disk; not atomic by itself."""
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def temporary_name(path: Path) -> Path:
    """A hidden name next to ``path``, which readers ignore and `ArtifactStore.clean` removes."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
