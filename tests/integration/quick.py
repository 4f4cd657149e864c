"""``textalign …`` whose trainings run in its own process: for tests that are not about ``accelerate launch``.

A training in a process of its own spends its time on starting: five seconds of imports for a second of work.
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

import training.train
from resources.launchers.launcher import Launched, LocalLauncher, Work, read_marker
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


LocalLauncher.train = train  # type: ignore[method-assign]

if __name__ == "__main__":
    main()
