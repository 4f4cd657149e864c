"""The ledger: several writers, torn lines, kills at the worst moments, and its size."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resources.judges.ledger import Ledger
from resources.judges.ledger_records import FEEDBACK_CALLS, CallRecord
from resources.store import ArtifactError, ArtifactStore
from resources.views import connect, write_catalog
from textalign_dagster import PROJECT

START = datetime(2026, 1, 1, tzinfo=UTC)


def record(n: int, status: str = "ok", **more: Any) -> CallRecord:
    plain: dict[str, Any] = {name: None for name in CallRecord._fields}
    plain |= {"judge": "judge-1", "endpoint": "http://host/v1", "messages_hash": "h", "params": "{}"}
    plain |= {"repeat": 0, "attempts": 1, "lost_replies": 0, "chars_in": 40, "batch_id": "b", "purpose": ""}
    if status == "ok":
        plain |= {"raw_reply": f"reply {n}", "tokens_in": 10, "tokens_out": 5, "usd": 0.5, "latency_s": 1}
    plain |= {"call_key": f"key{n:09}", "called_at": START + timedelta(microseconds=n), "status": status}
    return CallRecord(**(plain | more))


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


@pytest.fixture(params=["local", "memory"])
def any_store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "local":
        return ArtifactStore(tmp_path / "store")
    pytest.importorskip("obstore", reason="object stores need the extra s3")
    return ArtifactStore(f"memory://ledger-{time.time_ns()}", cache=tmp_path / "cache")


def segments(store: ArtifactStore) -> list[Path]:
    return sorted((store.local / "ledger" / "segments").glob("*.jsonl"))


def in_process(code: str, *arguments: str) -> subprocess.Popen[str]:
    prelude = "import sys; import polars as pl; from tests.resources.judges.test_ledger import *\n"
    return subprocess.Popen(
        [sys.executable, "-c", prelude + code, *arguments], cwd=PROJECT, stdout=subprocess.PIPE, text=True
    )


def test_added_calls_are_readable(any_store: ArtifactStore) -> None:
    with Ledger(any_store) as ledger:
        assert ledger.frame().schema == FEEDBACK_CALLS and ledger.outcomes(["key000000001"]) == {}
        added = [record(1, raw_reply='line\nbreak " é \0', refusal="no"), record(2), record(3, "failed")]
        for call in added:
            ledger.add(call)
        ledger.flush()
        for reader in (ledger, Ledger(any_store)):
            assert reader.frame().schema == FEEDBACK_CALLS
            assert [CallRecord._make(row) for row in reader.frame().iter_rows()] == added
            assert reader.outcomes([f"key{n:09}" for n in range(9)]) == {r.call_key: r for r in added}
    with Ledger(any_store) as ledger:
        assert ledger.compact().rows == 3
        assert [CallRecord._make(row) for row in ledger.frame().iter_rows()] == added
        ledger.add(record(4))  # a reopened ledger accepts more calls
        ledger.flush()
        assert ledger.frame().height == 4


def test_lone_surrogates_do_not_break_readers(store: ArtifactStore) -> None:
    with Ledger(store) as ledger:
        ledger.add(record(1, raw_reply="half \ud83d of a pair"))
        ledger.flush()
        assert ledger.outcomes(["key000000001"])["key000000001"].raw_reply == "half ? of a pair"


def test_the_first_reply_wins_and_every_payment_is_recorded(store: ArtifactStore) -> None:
    with Ledger(store) as first, Ledger(store) as second:
        second.add(record(1, called_at=START + timedelta(seconds=9), raw_reply="later"))
        first.add(record(1))
        first.flush(), second.flush()
        assert first.outcomes(["key000000001"])["key000000001"].raw_reply == "reply 1"
        assert second.frame()["usd"].sum() == 1.0


def test_calls_in_flight_become_lost_once_their_writer_is_gone(store: ArtifactStore) -> None:
    with Ledger(store) as reader:
        writer = Ledger(store)
        for n, status in ((1, "sent"), (2, "sent"), (2, "ok"), (3, "sent"), (3, "failed")):
            writer.add(record(n, status))
        writer.flush()
        assert reader.frame()["status"].to_list() == ["sent", "ok", "failed"]
        assert reader.compact().segments == 0  # its writer is still alive
        writer.close()
        assert reader.frame()["status"].to_list() == ["lost", "ok", "failed"]
        assert reader.compact().rows == 3 and not segments(store)
        assert reader.frame()["status"].to_list() == ["lost", "ok", "failed"]
        assert set(reader.outcomes([f"key{n:09}" for n in range(5)])) == {"key000000002", "key000000003"}


def test_several_processes_write_concurrently(store: ArtifactStore) -> None:
    code = """
with Ledger(ArtifactStore(sys.argv[1])) as ledger:
    for n in range(int(sys.argv[2]), int(sys.argv[2]) + 500):
        ledger.add(record(n, "sent"))
        ledger.add(record(n))
        if n % 100 == 0:
            ledger.flush()
"""
    writers = [in_process(code, str(store.local), str(i * 500)) for i in range(3)]
    with Ledger(store) as reader:
        heights = []
        while any(writer.poll() is None for writer in writers):
            reader.compact()
            heights.append(reader.frame().height)
        assert [writer.communicate()[0] for writer in writers] and heights == sorted(heights)
        assert {writer.returncode for writer in writers} == {0}
        assert reader.frame()["call_key"].to_list() == [f"key{n:09}" for n in range(1500)]
        reader.compact()
        assert reader.frame().height == 1500 and not segments(store) and not reader.damages


@settings(max_examples=30, deadline=None)
@given(cut=st.integers(1, 400), garbage=st.booleans())
def test_a_torn_last_line_loses_only_itself(
    tmp_path_factory: pytest.TempPathFactory, cut: int, garbage: bool
) -> None:
    store = ArtifactStore(tmp_path_factory.mktemp("torn"))
    with Ledger(store) as ledger:
        for n in range(3):
            ledger.add(record(n))
    (segment,) = segments(store)
    whole = segment.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == 10]
    cut = min(cut, len(whole) - ends[1] - 1)
    segment.write_bytes(whole[: len(whole) - cut] + (b"\0\0\0" if garbage else b""))
    reader = Ledger(store)
    assert reader.frame()["call_key"].to_list() == ["key000000000", "key000000001"]
    assert len(reader.damages) == (len(whole) - cut > ends[1] + 1 or garbage)
    assert all("incomplete" in damage and segment.name in damage for damage in reader.damages)
    assert reader.compact().rows == 2


def test_a_damaged_line_loses_only_itself(store: ArtifactStore) -> None:
    with Ledger(store) as ledger:
        for n in range(3):
            ledger.add(record(n))
    (segment,) = segments(store)
    lines = segment.read_bytes().splitlines(keepends=True)
    segment.write_bytes(lines[0] + b"\0" * 40 + b"\n" + lines[2])
    reader = Ledger(store)
    assert reader.frame()["call_key"].to_list() == ["key000000000", "key000000002"]
    assert len(reader.damages) == 1 and "line 2" in reader.damages[0]


STEPS = ("write_parquet", "sync", "replace", "sync", "remove", "remove")


@pytest.mark.parametrize("step", range(len(STEPS)))
def test_compaction_killed_at_any_step_neither_loses_nor_duplicates_calls(
    store: ArtifactStore, step: int
) -> None:
    for half in range(2):
        with Ledger(store) as ledger:
            for n in range(half * 10, half * 10 + 10):
                ledger.add(record(n, "sent"))
                ledger.add(record(n))
            ledger.add(record(100 + half, "sent"))
    code = """
import os, resources.judges.ledger as module
step, count = int(sys.argv[2]), 0
def deadly(function):
    def call(*arguments, **named):
        global count
        if count == step:
            os.kill(os.getpid(), 9)
        count += 1
        return function(*arguments, **named)
    return call
store = ArtifactStore(sys.argv[1])
module.sync = deadly(module.sync)
pl.DataFrame.write_parquet = deadly(pl.DataFrame.write_parquet)
Path.replace = deadly(Path.replace)
store.storage.remove = deadly(store.storage.remove)
with Ledger(store) as ledger:
    ledger.compact()
"""
    before = Ledger(store).frame()
    killed = in_process(code, str(store.local), str(step))
    killed.communicate()
    assert killed.returncode == -9
    for _ in range(2):
        ledger = Ledger(store)
        assert ledger.frame().equals(before)
        ledger.compact()
        assert ledger.frame().equals(before) and not segments(store)
    assert before["status"].value_counts(sort=True).rows() == [("ok", 20), ("lost", 2)]


def test_a_killed_writer_loses_no_lines(store: ArtifactStore) -> None:
    code = """
ledger = Ledger(ArtifactStore(sys.argv[1]))
for n in range(10**9):
    ledger.add(record(n))
    print(n, flush=True)
"""
    with in_process(code, str(store.local)) as writer:
        assert writer.stdout is not None
        while (last := int(writer.stdout.readline())) < 200:
            pass
        writer.kill()
        last = max([last, *map(int, writer.stdout.read().split())])
    rows = Ledger(store).frame()
    assert rows["call_key"].to_list()[: last + 1] == [f"key{n:09}" for n in range(last + 1)]
    assert rows.height <= last + 2


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ArtifactStore]:
    store = ArtifactStore(tmp_path_factory.mktemp("large"))
    reply = "Analysis: " + "the summary is clear, " * 12
    with Ledger(store) as ledger:
        for n in range(100_000):
            ledger.add(record(n, raw_reply=reply))
    yield store


@pytest.mark.parametrize("compacted", [False, True])
def test_a_hundred_thousand_lookups_take_less_than_a_second(large: ArtifactStore, compacted: bool) -> None:
    ledger = Ledger(large)
    if compacted:
        assert ledger.compact().rows == 100_000
    keys = [f"key{n:09}" for n in range(50_000, 150_000)]
    seconds = []
    for _ in range(3):
        started = time.process_time()  # CPU time of all threads: more than the wall time on an idle machine
        assert len(ledger.outcomes(keys)) == 50_000
        seconds.append(time.process_time() - started)
    assert min(seconds) < 1.0


def test_an_unwritable_ledger_raises(store: ArtifactStore) -> None:
    store.local.mkdir()
    (store.local / "ledger").write_text("in the way")
    with pytest.raises(ArtifactError, match="ledger"):
        Ledger(store).add(record(1))


def test_the_view_equals_the_ledger_before_and_after_compaction(store: ArtifactStore) -> None:
    def viewed() -> pl.DataFrame:
        with connect(store) as database:
            return database.sql("FROM feedback_calls ORDER BY called_at, call_key").pl().cast(FEEDBACK_CALLS)

    assert viewed().is_empty()
    with Ledger(store) as ledger:
        for n, status in ((1, "sent"), (1, "ok"), (2, "failed"), (3, "sent")):
            ledger.add(record(n, status))
        ledger.flush()
        assert viewed().equals(ledger.frame()), "while a call is in flight"
    whole = [path.read_bytes() for path in segments(store)]
    ledger.compact()
    with ledger:
        ledger.add(record(4, raw_reply="it's new"))
        ledger.flush()
        assert viewed()["status"].to_list() == ["ok", "failed", "lost", "ok"]
        assert viewed().equals(ledger.frame()), "from Parquet and from a segment"
        for number, data in enumerate(whole):  # as left by a compaction killed before removing them
            (store.local / "ledger" / "segments" / f"again-{number}.jsonl").write_bytes(data)
        assert viewed().equals(ledger.frame()), "a call in both is one row"


def test_a_catalog_does_not_copy_compacted_calls(store: ArtifactStore) -> None:
    with Ledger(store) as ledger:
        for n in range(2_000):
            ledger.add(record(n, raw_reply=os.urandom(500).hex()))
    ledger.compact()
    assert write_catalog(store).stat().st_size < 1_000_000
    with duckdb.connect(store.local / "catalog.duckdb", read_only=True) as database:
        assert database.execute("SELECT count(*), sum(usd) FROM feedback_calls").fetchall() == [
            (2_000, 1_000)
        ]


def test_a_ledger_without_the_newest_column_is_readable(store: ArtifactStore) -> None:
    """A segment and a Parquet file written before replies named their model."""
    names = [name for name in FEEDBACK_CALLS if name != "reply_model"]
    old = pl.DataFrame([record(n)._asdict() for n in (1, 2)], schema=FEEDBACK_CALLS).select(names)
    compacted = store.local / "ledger" / "compacted" / "old.parquet"
    compacted.parent.mkdir(parents=True)
    old.write_parquet(compacted)
    segment = store.local / "ledger" / "segments" / "20260101T000000-1-00000000.jsonl"
    segment.parent.mkdir(parents=True)
    segment.write_bytes(record(3).line())
    assert b"reply_model" not in segment.read_bytes()
    with Ledger(store) as ledger:
        ledger.add(record(4, reply_model="m-1"))
        ledger.flush()
        assert ledger.frame().schema == FEEDBACK_CALLS
        assert ledger.frame()["reply_model"].to_list() == [None, None, None, "m-1"]
        assert len(ledger.outcomes([f"key{n:09}" for n in (1, 2, 3, 4)])) == 4
    with connect(store) as database:
        rows = database.execute("SELECT call_key, reply_model FROM feedback_calls ORDER BY ALL").fetchall()
    assert rows == [(f"key{n:09}", "m-1" if n == 4 else None) for n in (1, 2, 3, 4)]


def test_a_call_stopped_by_an_earlier_version_has_no_outcome(store: ArtifactStore) -> None:
    with Ledger(store) as ledger:
        ledger.add(record(1, "failed", error="stopped while in flight"))
        ledger.add(record(2, "stopped", error="HTTP 503: Overloaded"))
        ledger.add(record(3, "failed", error="HTTP 503: Overloaded"))
        ledger.flush()
        assert list(ledger.outcomes([f"key{n:09}" for n in (1, 2, 3)])) == ["key000000003"]
