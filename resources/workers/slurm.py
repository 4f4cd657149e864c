"""Workers on a node of a Slurm cluster: `srun` carries their stdin and stdout; nothing else changes.

A worker ends when its stdin does, as it would on this machine. If `srun` itself is killed, Slurm would
keep the node until the time limit; so each worker's job has a unique name, by which it is cancelled. Jobs
of processes on this machine that are gone are cancelled by the next one that starts a worker.
"""

from __future__ import annotations

import itertools
import os
import shlex
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

from resources.compute import slurm
from textalign_dagster.settings.clusters import SlurmNode

_numbers = itertools.count()


@dataclass(frozen=True)
class SlurmHost:
    """A node of a Slurm cluster; see `host.Host`."""

    settings: SlurmNode

    @property
    def cpus(self) -> int | None:
        """CPUs of a worker; None: the cluster's default."""
        return self.settings.cpus_per_task

    def start(
        self, command: list[str], environment: Mapping[str, str]
    ) -> tuple[str, list[str], dict[str, str]]:
        end_abandoned()
        name = f"{_prefix()}{os.getpid()}-{next(_numbers)}"
        line = "\n".join(["set -e", *self.settings.setup, f"exec {shlex.join(command)}"])
        srun = [
            "srun",
            "--quiet",
            f"--job-name={name}",
            "--nodes=1",
            "--ntasks=1",
            "--export=ALL",  # of srun's own environment, which is minimal
            *slurm.options(self.settings),
            *("/bin/bash", "-c", line),
        ]
        return name, srun, {**slurm.inherited(os.environ), **environment}

    def end(self, name: str) -> None:
        """Cancels the job, if there is one."""
        _cancel(name)


def end_abandoned() -> None:
    """Cancels jobs of workers whose process on this machine is gone."""
    for name in set(slurm.mine(_prefix()).values()):
        process = name.removeprefix(_prefix()).partition("-")[0]
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            _cancel(name)
        except (PermissionError, ValueError):  # it is alive, or the name is not of this form
            pass


def _prefix() -> str:
    return f"textalign-worker-{socket.gethostname()}-"


def _cancel(name: str) -> None:
    jobs = [job for job, found in slurm.mine(name).items() if found == name]
    with suppress(slurm.SlurmSilent):  # it ends at its time limit
        if jobs:
            slurm.cancel(jobs)
