"""The append-only ledger of judge calls: question, reply, cost.

Layout below the store's root::

    ledger/segments/{time}-{pid}-{random}.jsonl     the lines of one writer (see `ledger_writer`)
    ledger/compacted/{hash}.parquet                 the rows of segments whose writers have ended

A line is a row of `FEEDBACK_CALLS` without NULLs. A call has two lines with the same identity (call_key,
called_at): ``sent`` before the request, ``ok``, ``failed`` or ``stopped`` when it ends; the later one counts.
A ``sent`` without an end, from a writer that no longer runs, is read as ``lost``: the process was killed and
the call may have been paid for. Compaction publishes a Parquet file before it removes the segments, and
readers count each identity once: whenever compaction is killed, nothing is lost or counted twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl

from resources.judges.ledger_records import CallRecord, no_calls, one_row_a_call, outcomes, parse_lines
from resources.judges.ledger_writer import SEGMENTS, Writer, new_writer
from resources.store import ArtifactStore
from resources.store.durable import ArtifactError, make_folder, readable_errors, temporary_name
from textalign_dagster.disk import sync
from textalign_dagster.ids import content_hash

COMPACTED = "ledger/compacted"
COMPACT_BYTES = 8 * 2**20  # of finished segments, or…
COMPACT_SEGMENTS = 64  # …or this many of them trigger a compaction
REMOTE_ALIVE = timedelta(hours=1)  # on an object store, a writer counts as running for this long


@dataclass(frozen=True)
class History:
    """Past usage of a judge: sums over ``calls`` replies with known token counts."""

    calls: int
    chars_in: int
    tokens_in: int
    tokens_cached: int
    tokens_out: int
    seconds: float


@dataclass(frozen=True)
class Compaction:
    """The result of a compaction: segments and rows moved, and damaged lines."""

    segments: int
    rows: int
    damages: list[str]


class Ledger:
    """A store's ledger of judge calls. A context manager; thread-safe.

    ``damages`` lists the lines that the last read skipped, such as torn last lines of killed writers.
    """

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self.storage = store.storage
        self._opening = threading.Lock()
        self._writer: Writer | None = None
        self.damages: list[str] = []

    def add(self, record: CallRecord) -> None:
        """Append a row; ``flush`` returns when it is on disk.

        Raises:
            ArtifactError: this or an earlier row could not be saved (disk full, no permission).
        """
        with self._opening:
            if self._writer is None:
                self._writer = new_writer(self.storage)
            writer = self._writer
        writer.add(record.line())

    def flush(self) -> None:
        """Wait until every row so far is on disk. Raises as `add` does."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Flush and release this writer's segment. A later `add` starts a new one."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextlib.contextmanager
    def alone(self, batch_id: str, waiting: Callable[[], None]) -> Iterator[None]:
        """Locks a batch of calls: another process with the same batch waits, and then finds the replies.

        Works among processes on one machine; an object store has no lock.

        Args:
            waiting: called when another process holds the lock.
        """
        with contextlib.ExitStack() as held:
            if not self._store.is_remote:
                place = Path(self.storage.place(f"ledger/batches_held/{batch_id}.lock"))
                with readable_errors(self._store.local, place, "write"):
                    make_folder(place.parent)
                    handle = os.open(place, os.O_RDWR | os.O_CREAT, 0o666)
                held.callback(os.close, handle)  # releases the lock, as does the end of the process
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    waiting()
                    fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def frame(self) -> pl.DataFrame:
        """Every row, ordered by call time."""
        return self._read(lambda rows: rows).sort("called_at", "call_key")

    def rows(self, keys: Collection[str]) -> pl.DataFrame:
        """Every row with one of these call keys, ordered by call time."""
        wanted = pl.Series("call_key", list(keys), dtype=pl.String)
        # A semi-join rather than is_in: linear in both, and it does not delay column pruning.
        return self._read(lambda rows: rows.join(wanted.to_frame().lazy(), on="call_key", how="semi")).sort(
            "called_at", "call_key"
        )

    def outcomes(self, keys: Collection[str]) -> dict[str, CallRecord]:
        """The outcome of each of these calls that has one: its first reply, or why it was given up."""
        return outcomes(self.rows(keys))

    def history(self, judge: str, endpoint: str, params: str | None = None) -> History:
        """Past usage of this judge; with these parameters only, if given."""
        mine = (
            (pl.col("judge") == judge)
            & (pl.col("endpoint") == endpoint)
            & (pl.col("status") == "ok")
            & pl.col("tokens_in").is_not_null()
            & pl.col("tokens_out").is_not_null()
        )
        if params is not None:
            mine &= pl.col("params") == params
        rows = self._read(lambda rows: rows.filter(mine))
        sums = rows.select(
            pl.col("chars_in", "tokens_in", "tokens_cached", "tokens_out", "latency_s").sum()
        ).row(0)
        chars, fresh, cached, out = (int(value) for value in sums[:4])
        return History(rows.height, chars, fresh, cached, out, float(sums[4]))

    def parts(self) -> tuple[list[Path], pl.DataFrame]:
        """The ledger without reading all of it: Parquet files, and the rows that are not in one yet.

        The files never change. An identity may be in both, or in several files: the row with the lowest
        `STATUS_RANK` counts, and among these the one with the most attempts.
        """
        damages: list[str] = []
        # Segments first, as in `_read`.
        recent = self._read_segments(self._segment_names(), damages)
        paths = list(self._parquet())
        self.damages = damages
        return paths, one_row_a_call(pl.concat([no_calls(), *recent]))

    def compact_if_due(self) -> Compaction | None:
        """`compact` if segments have become large or numerous, else None."""
        sizes = [size for size, _ in self.storage.entries(SEGMENTS).values()]
        if sum(sizes) < COMPACT_BYTES and len(sizes) < COMPACT_SEGMENTS:
            return None
        return self.compact()

    def compact(self) -> Compaction:
        """Move the rows of finished writers from segments into one Parquet file."""
        with contextlib.ExitStack() as locks:
            if not self._is_only_compaction(locks):
                return Compaction(0, 0, [])
            names = [name for name in self._segment_names() if self._is_over(name, locks)]
            damages: list[str] = []
            frames = self._read_segments(names, damages)
            rows = one_row_a_call(pl.concat([no_calls(), *frames])).sort("called_at", "call_key")
            if rows.height:
                self._publish(f"{COMPACTED}/{content_hash('compacted', names)}.parquet", rows)
            for name in names:
                self.storage.remove(name)
            return Compaction(len(names), rows.height, damages)

    def _read(self, narrow: Any) -> pl.DataFrame:
        """All rows after ``narrow`` (LazyFrame → LazyFrame), one per identity."""
        for _ in range(100):
            damages: list[str] = []
            # Segments first: the rows of one that disappears meanwhile are in a Parquet file listed later.
            segments = self._read_segments(self._segment_names(), damages)
            parts = [narrow(frame.lazy()).collect() for frame in segments]
            try:
                parts += [narrow(pl.scan_parquet(path)).collect() for path in self._parquet()]
            except FileNotFoundError:
                continue
            self.damages = damages
            # Files written before a column was added lack it.
            return one_row_a_call(pl.concat([no_calls(), *parts], how="diagonal"))
        raise ArtifactError(f"{self.storage.place('ledger')} changes faster than it can be read")

    def _segment_names(self) -> list[str]:
        names = self.storage.entries(SEGMENTS)
        return sorted(name for name in names if name.endswith(".jsonl"))

    def _read_segments(self, names: Sequence[str], damages: list[str]) -> list[pl.DataFrame]:
        found = []
        for name, data in zip(names, self._store.each(self.storage.read, names), strict=True):
            if not data:
                continue
            over = self._is_over(name)
            whole, newline, torn = data.rpartition(b"\n")
            if torn and over:
                place = self.storage.place(name)
                damages.append(f"{place}: the last line is incomplete ({len(torn)} bytes) and was skipped")
            frame = parse_lines(whole + newline, self.storage.place(name), damages)
            oldest = datetime.now(UTC) - REMOTE_ALIVE
            gone = pl.lit(over) | (pl.lit(self._store.is_remote) & (pl.col("called_at") < oldest))
            status = pl.when((pl.col("status") == "sent") & gone).then(pl.lit("lost"))
            found.append(frame.with_columns(status.otherwise("status").alias("status")))
        return found

    def _parquet(self) -> Iterator[Path]:
        for name in sorted(self.storage.entries(COMPACTED)):
            base = name.rsplit("/", 1)[-1]
            if base.startswith(".") or not base.endswith(".parquet"):
                continue
            if self._store.is_remote:  # never changes: fetched once
                local = self._store.local / name
                if not local.exists():
                    self.storage.download(name, local)
                yield local
            else:
                yield Path(self.storage.place(name))

    def _publish(self, name: str, rows: pl.DataFrame) -> None:
        path = self._store.local / name
        temporary = temporary_name(path)
        with readable_errors(self._store.local, path, "write"):
            make_folder(path.parent)
            try:
                rows.write_parquet(temporary, compression="zstd", compression_level=3)
                sync(temporary)
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)
            sync(path.parent)
        if self._store.is_remote:
            self.storage.upload(name, path)

    def _is_only_compaction(self, locks: contextlib.ExitStack) -> bool:
        """Take the compaction lock of a local store; on an object store, a second compaction only duplicates work."""
        if self._store.is_remote:
            return True
        place = Path(self.storage.place("ledger/compaction.lock"))
        with readable_errors(self._store.local, place, "write"):
            make_folder(place.parent)
            return self._locked(os.open(place, os.O_RDWR | os.O_CREAT, 0o666), fcntl.LOCK_EX, locks)

    def _is_over(self, name: str, locks: contextlib.ExitStack | None = None) -> bool:
        """Whether a segment's writer has ended. With ``locks``, this holds until they are released."""
        if self._store.is_remote:
            return locks is not None  # objects never change; whether the writer still runs is unknown
        try:
            handle = os.open(self.storage.place(name), os.O_RDONLY)
        except FileNotFoundError:
            return False
        with contextlib.ExitStack() as for_now:
            # Shared, so that readers and a compaction do not mistake each other for the writer.
            return self._locked(handle, fcntl.LOCK_SH, for_now if locks is None else locks)

    @staticmethod
    def _locked(handle: int, kind: int, locks: contextlib.ExitStack) -> bool:
        try:
            fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return False
        locks.callback(os.close, handle)
        return True
