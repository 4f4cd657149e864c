"""Runs experiments one after the other in one process: ``zoo.py NAME…``, then a name a line on stdin.

What ``textalign run`` does in a process of its own, without starting one for each: the engine stays, and a training
runs here by `training.train.run` instead of under ``accelerate launch``, which other tests are about. Answers a line a
name: empty, or what went wrong.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import dagster as dg
from rich.console import Console

import training.train
from resources.launchers.launcher import Launched, LocalLauncher, Work, read_marker
from textalign_dagster.cli.command import open_store
from textalign_dagster.cli.main import _show
from textalign_dagster.cli.preflight import preflight
from textalign_dagster.cli.running import RunFailed, Runner, dagster_instance
from textalign_dagster.experiment.files import Library
from textalign_dagster.settings import SettingsError
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
    started = training.train.STARTED = time.monotonic()
    job = Path(work.write(work.place)[-1])
    with patch.dict(os.environ, work.env):
        try:
            training.train.run(read_job(job), Told(work))
        except TrainingError as error:
            raise dg.Failure(f"{type(error).__name__}: {error}", allow_retries=False) from None
    return Launched(time.monotonic() - started, read_marker(work.folder("model") / "done.json"))


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr
    LocalLauncher.train = train  # type: ignore[method-assign]
    library, store, console = Library.default(), open_store(), Console(file=sys.stderr, width=140)
    with dagster_instance() as instance:
        for line in sys.stdin:
            name, problem = line.strip(), ""
            try:
                preflight(library, name)
                Runner(instance, store, library, console).run([name])
                _show(library, name, console)
            except (RunFailed, SettingsError) as error:
                problem = " ".join(str(error).split()) or type(error).__name__
            print(problem, file=answers, flush=True)


if __name__ == "__main__":
    main()
