"""How much of the embedded run is not spent on sampling, scoring, training or evaluating.

    python -m benchmarks.orchestration [EXPERIMENT] [--iterations K]

Runs the experiment from scratch in a temporary home and prints the seconds by stage. *Work* is the time
that stages report for it; *starting* is the rest of the time between the start and the end of
`accelerate launch`: its own start, importing libraries, loading and saving the model; the rest of the
wall time is orchestration: Dagster, the store, checks, metadata, the command line itself.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time

from resources.store import ArtifactStore


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiment", nargs="?", default="pep8_alt_lmu")
    parser.add_argument("--iterations", type=int)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        command = [sys.executable, "-m", "textalign_dagster.cli.main", "run", arguments.experiment]
        if arguments.iterations:
            command += ["--iterations", str(arguments.iterations)]
        started = time.monotonic()
        subprocess.run(command, env={**os.environ, "TEXTALIGN_HOME": home}, check=True)
        wall = time.monotonic() - started
        store = ArtifactStore(f"{home}/store")
        work: dict[str, float] = {}
        starting = 0.0
        for experiment, iteration, stage, reused in (
            store.cells().select("experiment", "iteration", "stage", "reused").iter_rows()
        ):
            pointer = store.pointer(experiment, iteration, stage)
            if reused or pointer is None:
                continue
            facts = pointer.artifact.manifest["facts"]
            work[stage] = work.get(stage, 0.0) + facts.get("work_seconds", 0.0)
            if stage == "checkpoint":
                seconds = pointer.artifact.frame("checkpoints")["seconds"].item()
                starting += seconds - facts["work_seconds"]
    rest = wall - sum(work.values()) - starting
    for stage, seconds in work.items():
        print(f"{stage:<22}{seconds:8.1f} s {seconds / wall:7.1%}")
    print(f"{'starting trainers':<22}{starting:8.1f} s {starting / wall:7.1%}")
    print(f"{'orchestration':<22}{rest:8.1f} s {rest / wall:7.1%}")
    print(f"{'wall':<22}{wall:8.1f} s")


if __name__ == "__main__":
    main()
