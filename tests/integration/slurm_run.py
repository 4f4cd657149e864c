"""A Dagster process with a training run on Slurm, which tests end from outside: ``slurm_run HOW FOLDER HISTORY``."""

import os
import signal
import sys
from pathlib import Path

import dagster as dg

from resources.launchers.slurm_job import SlurmJob
from tests.integration.test_slurm import train
from textalign_dagster.progress import shown_by

if __name__ == "__main__":
    how, folder, history = sys.argv[1], Path(sys.argv[2]), sys.argv[3]
    if how == "dies after sbatch":
        SlurmJob.record = lambda self, job_id: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]
    instance = dg.DagsterInstance.local_temp(str(folder / history))
    if how == "with somebody waiting":
        with shown_by(lambda event: None):
            train(folder, instance=instance)
    else:
        train(folder, instance=instance)
