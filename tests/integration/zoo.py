"""Runs experiments one after the other in one process: ``zoo.py``, then a name a line on stdin.

What ``textalign run`` does in a process of its own, without starting one for each: the engine stays, and trainings run
in this process (`quick.py`). Answers a line a name: empty, or what went wrong.
"""

from __future__ import annotations

import gc
import sys

from rich.console import Console

from tests.integration import quick
from textalign_dagster.cli.command import open_store
from textalign_dagster.cli.preflight import preflight
from textalign_dagster.cli.results import show_scores
from textalign_dagster.cli.running import RunFailed, Runner, dagster_instance
from textalign_dagster.experiment.files import Library
from textalign_dagster.settings import SettingsError


def main() -> None:
    quick.install()
    answers, sys.stdout = sys.stdout, sys.stderr
    gc.freeze()  # each training collects garbage, and need not look through all that was imported
    library, store, console = Library.default(), open_store(), Console(file=sys.stderr, width=140)
    with dagster_instance() as instance:
        for line in sys.stdin:
            name, problem = line.strip(), ""
            try:
                preflight(library, name)
                Runner(instance, store, library, console).run([name])
                show_scores(library, name, console)
            except (RunFailed, SettingsError) as error:
                problem = " ".join(str(error).split()) or type(error).__name__
            print(problem, file=answers, flush=True)


if __name__ == "__main__":
    main()
