"""Appending to the ledger: a line is safe from kill -9 when `add` returns, on disk when `flush` does.

On a local store every writer has its own file, a segment, locked while the writer lives; a thread
syncs it to disk a few milliseconds after a line arrives, together with all lines that arrive meanwhile
(group commit). On an object store, where files cannot grow, every commit is a small object.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
from abc import ABC, abstractmethod
from datetime import UTC, datetime
from pathlib import Path

from resources.store.durable import ArtifactError, make_folder, readable_errors
from resources.store.storage import LocalStorage, Storage
from textalign_dagster.disk import sync

SEGMENTS = "ledger/segments"
GATHER_S = 0.004  # how long a commit waits for further lines
BACKLOG_BYTES = 64 * 2**20  # of unsaved lines, before `add` blocks on an object store


def new_writer(storage: Storage) -> Writer:
    """A writer of segments below the storage's ``ledger/segments``."""
    if isinstance(storage, LocalStorage):
        return FileWriter(storage.root)
    return ObjectWriter(storage)


def _new_name() -> str:
    return f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{os.getpid()}-{secrets.token_hex(4)}"


class Writer(ABC):
    """Appends lines; thread-safe. A thread calls `_commit` soon after `_added`, once for all lines added meanwhile."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._appended = 0  # lines added
        self._done = 0  # lines committed
        self._closing = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="ledger", daemon=True)
        self._thread.start()

    @abstractmethod
    def add(self, line: bytes) -> None:
        """Append a line.

        Raises:
            ArtifactError: this or an earlier line could not be saved.
        """

    @abstractmethod
    def _commit(self) -> None:
        """Make everything durable that has been added so far."""

    @abstractmethod
    def close(self) -> None:
        """Flush and close; the writer's segments can then be compacted."""

    def _added(self) -> None:
        """Announce a new line; call with ``_changed`` held."""
        self._appended += 1
        self._changed.notify_all()

    def _check(self) -> None:
        if self._error is not None:
            reason = str(self._error) or type(self._error).__name__
            raise ArtifactError(f"the ledger of judge calls cannot be saved: {reason}") from self._error

    def flush(self) -> None:
        """Wait until all lines so far are on disk. Raises as `add` does."""
        with self._changed:
            target = self._appended
            self._changed.wait_for(lambda: self._done >= target or self._error is not None)
            self._check()

    def _stop(self) -> None:
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._appended > self._done or self._closing)
                if self._appended == self._done:
                    return
                if not self._closing:
                    self._changed.wait_for(lambda: self._closing, timeout=GATHER_S)
                target = self._appended
            try:
                self._commit()
            except BaseException as error:  # noqa: BLE001  # re-raised by `add` and `flush`
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._done = target
                self._changed.notify_all()


class FileWriter(Writer):
    """A segment file. Lines reach the operating system at once and the disk with the next commit."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folder = root / SEGMENTS
        with readable_errors(root, self._folder, "write to"):
            make_folder(self._folder)
            self.path, self._handle = self._open()
        super().__init__()

    def _open(self) -> tuple[Path, int]:
        while True:
            path = self._folder / f"{_new_name()}.jsonl"
            handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
            fcntl.flock(handle, fcntl.LOCK_EX)
            # Between the two calls a compaction may have found it unlocked and removed it.
            if path.exists() and os.path.samestat(os.fstat(handle), path.stat()):
                sync(self._folder)
                return path, handle
            os.close(handle)

    def add(self, line: bytes) -> None:
        with self._changed:
            self._check()
            try:
                with readable_errors(self._root, self.path, "write"):
                    written = os.write(self._handle, line)
                    while written < len(line):
                        written += os.write(self._handle, line[written:])
            except ArtifactError as error:
                self._error = error  # the line may be torn: nothing must follow it
                raise
            self._added()

    def _commit(self) -> None:
        with readable_errors(self._root, self.path, "write"):
            os.fsync(self._handle)

    def close(self) -> None:
        if self._handle < 0:
            return
        self._stop()
        os.close(self._handle)
        self._handle = -1
        self._check()


class ObjectWriter(Writer):
    """Objects ``{name}-{number}.jsonl``. While one is being put, the lines for the next accumulate.

    The ``sent`` line of a call is therefore put while the call is in flight: a machine that dies
    during that put (some 50 ms) leaves no trace of the call.
    """

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.name = _new_name()
        self._number = 0
        self._lines: list[bytes] = []
        self._bytes = 0
        super().__init__()

    def add(self, line: bytes) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._bytes < BACKLOG_BYTES or self._error is not None)
            self._check()
            self._lines.append(line)
            self._bytes += len(line)
            self._added()

    def _commit(self) -> None:
        with self._changed:
            lines, self._lines, self._bytes = self._lines, [], 0
        self._number += 1
        self._storage.create(f"{SEGMENTS}/{self.name}-{self._number:06d}.jsonl", b"".join(lines))

    def close(self) -> None:
        if not self._closing:
            self._stop()
        self._check()
