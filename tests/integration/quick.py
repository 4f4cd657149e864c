"""``textalign …`` whose trainings run in its own process, and whose workers are forked: for tests of something else.

A separate process would spend its time on starting: five seconds of imports for a second of work. Dagster's history is
kept in open databases, which takes a third off an iteration.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import dagster as dg
import sqlalchemy
from dagster._core.storage.event_log.sqlite import sqlite_event_log
from dagster._core.storage.runs.sqlite import sqlite_run_storage
from dagster._core.storage.schedules.sqlite import sqlite_schedule_storage

import training.train
from resources.launchers.launcher import Launched, LocalLauncher, Work, read_marker
from resources.workers import channel
from tests import forked
from textalign_dagster.cli.main import main
from training.job import TrainingError, read_job


class Told:
    """The reporter of a training in this process."""

    def __init__(self, work: Work) -> None:
        self.work = work

    def progress(self, values: Mapping[str, Any]) -> None:
        self.work.on_progress(dict(values))

    def say(self, sentence: str) -> None:
        print(sentence, file=sys.stderr)


def train(self: LocalLauncher, context: dg.AssetExecutionContext, work: Work) -> Launched:
    """Stands in for `LocalLauncher.train`."""
    started = training.train.STARTED = time.monotonic()
    job = Path(work.write(work.place)[-1])
    with patch.dict(os.environ, work.env):
        try:
            training.train.run(read_job(job), Told(work))
        except TrainingError as error:
            raise dg.Failure(f"{type(error).__name__}: {error}", allow_retries=False) from None
    return Launched(time.monotonic() - started, read_marker(work.folder("model") / "done.json"))


@functools.cache
def engine(url: str) -> sqlalchemy.Engine:
    """Keeps a database of Dagster's history open, which would be opened for each event and written through to disk."""
    kept = sqlalchemy.create_engine(url)
    sqlalchemy.event.listen(
        kept, "connect", lambda connection, _: connection.execute("PRAGMA synchronous=OFF")
    )
    kept.dispose = lambda close=True: None  # type: ignore[method-assign]
    return kept


HISTORIES = (sqlite_event_log, sqlite_run_storage, sqlite_schedule_storage)
REPLACED: list[tuple[Any, str, Any]] = [
    (LocalLauncher, "train", train),
    (channel, "subprocess", forked.CHANNEL),
    *((history, "create_engine", lambda url, **_: engine(url)) for history in HISTORIES),
]


def install() -> None:
    """Replaces what takes longest, for as long as this process lives."""
    for owner, name, value in REPLACED:
        setattr(owner, name, value)


if __name__ == "__main__":
    install()
    main()
