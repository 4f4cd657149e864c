"""Where artifacts live: durable, atomic files in a local folder.

The store needs five operations from a storage: read, replace, *create if absent*, list, remove. On a
local folder, create-if-absent is a hard link to a complete, synced temporary file (``os.link``
refuses an existing name); `object_storage` does the same with conditional puts. A reader therefore
sees a whole file or none, no matter what is killed when.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit

from resources.store.durable import (
    ArtifactError,
    make_folder,
    readable_errors,
    temporary_name,
    write_durably,
)
from textalign_dagster.disk import sync

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class Storage(Protocol):
    """Named bytes under one root; names are relative, with ``/``."""

    def place(self, path: str) -> str:
        """The full name of ``path``: an absolute local path or a URL."""

    def read(self, path: str) -> bytes | None:
        """The bytes, or None if the file does not exist."""

    def replace(self, path: str, data: bytes) -> None:
        """Write ``path`` atomically: readers see the old bytes or the new ones."""

    def create(self, path: str, data: bytes) -> bool:
        """Write ``path`` unless it exists; returns whether this call wrote it. At most one caller succeeds."""

    def entries(self, prefix: str) -> dict[str, tuple[int, datetime]]:
        """Every file below the folder ``prefix``, with its size in bytes and modification time."""

    def upload(self, path: str, source: Path) -> None:
        """Upload a local file, whole or not at all. A no-op if ``source`` is that file."""

    def download(self, path: str, target: Path) -> None:
        """Fetch a file; ``target`` exists only when complete. A no-op if it is that file."""

    def remove(self, prefix: str) -> None:
        """Remove the file or folder ``prefix``, if it exists."""

    def ready(self) -> None:
        """Check once that create-if-absent works reliably here."""

    def filesystem(self) -> AbstractFileSystem | None:
        """The file system through which DuckDB reads ``place``; None for local files."""


class LocalStorage:
    """A folder. See `Storage`."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().resolve()
        if self.root.exists() and not self.root.is_dir():
            raise ArtifactError(f"{self.root} is a file: an artifact store is a folder or a URL")

    def place(self, path: str) -> str:
        return str(self.root / path)

    def read(self, path: str) -> bytes | None:
        with readable_errors(self.root, self.root / path, "read"):
            try:
                return (self.root / path).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def replace(self, path: str, data: bytes) -> None:
        with self._written(path, data) as (temporary, target):
            temporary.replace(target)

    def create(self, path: str, data: bytes) -> bool:
        with self._written(path, data) as (temporary, target):
            try:
                os.link(temporary, target)
            except FileExistsError:
                return False
            except OSError as error:
                if error.errno not in NO_LINKS:
                    raise
                return _rename_if_absent(temporary, target)
        return True

    @contextlib.contextmanager
    def _written(self, path: str, data: bytes) -> Iterator[tuple[Path, Path]]:
        """A synced temporary file next to the target, removed afterwards; the folder is synced last."""
        target = self.root / path
        temporary = temporary_name(target)
        with readable_errors(self.root, target, "write"):
            try:
                make_folder(target.parent)
                write_durably(temporary, data)
                yield temporary, target
            finally:
                temporary.unlink(missing_ok=True)
            sync(target.parent)

    def entries(self, prefix: str) -> dict[str, tuple[int, datetime]]:
        found: dict[str, tuple[int, datetime]] = {}
        for folder, _, names in os.walk(self.root / prefix):
            for name in names:
                path = Path(folder, name)
                with contextlib.suppress(FileNotFoundError):  # removed by its owner meanwhile
                    facts = path.stat()
                    written = datetime.fromtimestamp(facts.st_mtime, UTC)
                    found[path.relative_to(self.root).as_posix()] = (facts.st_size, written)
        return found

    def upload(self, path: str, source: Path) -> None:
        with readable_errors(self.root, self.root / path, "write"):
            if not source.samefile(self.root / path):
                raise OSError(errno.EINVAL, "local artifacts are written in place")

    def download(self, path: str, target: Path) -> None:
        with readable_errors(self.root, self.root / path, "read"):
            if not target.samefile(self.root / path):
                raise OSError(errno.EINVAL, "local artifacts are read in place")

    def remove(self, prefix: str) -> None:
        path = self.root / prefix
        with readable_errors(self.root, path, "remove"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def ready(self) -> None:
        pass

    def filesystem(self) -> AbstractFileSystem | None:
        return None


def _rename_if_absent(temporary: Path, target: Path) -> bool:
    """For file systems without hard links (exFAT, some mounts): check and rename under a lock."""
    with target.with_name(f".{target.name}.lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return False
        temporary.replace(target)
    return True


def open_storage(url: str) -> Storage:
    """The storage of a local path or a URL file://, s3://, gs://, az:// or memory://.

    Raises:
        ArtifactError: a URL of another kind, one that carries a password, or a missing package.
    """
    parts = urlsplit(url)
    if "://" not in url:
        return LocalStorage(Path(url))
    if parts.password or parts.username:
        raise ArtifactError(
            f"the store's URL carries credentials ({parts.scheme}://…@{parts.hostname}): "
            "leave them out and set the environment's variables (AWS_ACCESS_KEY_ID, …) instead"
        )
    if parts.scheme == "file":
        return LocalStorage(Path(unquote(parts.path)))
    if parts.scheme not in ("s3", "gs", "az", "memory"):
        raise ArtifactError(
            f"{url}: an artifact store is a local folder or a URL file://, s3://, gs://, az:// or memory://"
        )
    try:
        from resources.store.object_storage import ObjectStorage
    except ModuleNotFoundError as error:
        raise ArtifactError(
            f"{url} needs the package {error.name}: pip install 'textalign-dagster[s3]'"
        ) from error
    return ObjectStorage(url)
