"""Slurm's commands: submitting jobs, querying their state, and checks before submission.

A scheduler may not respond, may have forgotten a job, or may keep no accounting (`sacct`). None of these
means that a job has ended: callers get None, and decide how long to wait.
"""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from textalign_dagster.settings import SettingsError, nearest
from textalign_dagster.settings.clusters import Slurm, SlurmNode

COMMANDS = ("sbatch", "squeue", "scancel", "scontrol", "sinfo")
PATIENCE = 60.0  # seconds for a command to respond

OVER = (
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "REVOKED",
    "TIMEOUT",
)
"""States that a job does not leave, unless the scheduler requeues it."""

REQUEUED_AFTER = ("BOOT_FAIL", "NODE_FAIL", "PREEMPTED")
"""States after which Slurm itself may requeue a job a moment later."""

KEPT = re.compile(
    r"PATH|HOME|USER|LOGNAME|SHELL|LANG|LC_\w+|TZ|TMPDIR|TERM|LD_LIBRARY_PATH|PYTHONPATH|VIRTUAL_ENV|CONDA_\w+|"
    r"MODULE\w*|MODULES_\w+|LMOD\w*|BASH_ENV|BASH_FUNC_\w+(%%|\(\))|SLURM_CONF|SBATCH_\w+|CUDA_HOME|NCCL_\w+|"
    r"UCX_\w+|GLOO_\w+|TP_SOCKET_IFNAME|HF_HOME|HF_HUB_CACHE|TORCH_HOME"
)
"""Variables that a job inherits. Slurm would store all of them, judges' API keys included, in its own files."""


class SlurmSilent(Exception):
    """A Slurm command failed or did not respond; the message is the command's."""


@dataclass(frozen=True)
class Listed:
    """A job that is queued, running or being cleaned up."""

    job: str
    state: str
    reason: str
    folder: Path


@dataclass(frozen=True)
class State:
    """A job's state as the scheduler reports it. ``reason``: also why it is waiting."""

    name: str
    reason: str = ""
    exit_code: str = ""

    @property
    def is_over(self) -> bool:
        return self.name in OVER

    def __str__(self) -> str:
        parts = [self.reason if self.reason not in ("", "None", "(null)") else ""]
        parts.append(f"exit code {self.exit_code}" if self.exit_code not in ("", "0:0") else "")
        more = ", ".join(filter(None, parts))
        return f"{self.name} ({more})" if more else self.name


def submit(name: str, options: Sequence[str], script: Path) -> str:
    """Submits a batch script; returns the job's id.

    Raises:
        SettingsError: Slurm rejects it; the message quotes Slurm.
    """
    done = _call("sbatch", "--parsable", f"--job-name={name}", *options, str(script))
    if done.returncode != 0:
        raise SettingsError(
            f"training.slurm: sbatch refused the job: {_words(done.stderr)}; see training.slurm and the site's limits"
        )
    return done.stdout.strip().partition(";")[0]  # "id;cluster" on a federation


def listed(name: str) -> list[Listed]:
    """This user's unfinished jobs with this name, oldest first.

    Raises:
        SlurmSilent: squeue does not respond.
    """
    done = _call(
        "squeue", "--noheader", f"--name={name}", f"--user={_user()}", "--sort=i", "--format=%i|%T|%r|%Z"
    )
    if done.returncode != 0:
        raise SlurmSilent(f"squeue: {_words(done.stderr)}")
    rows = [line.strip().split("|", 3) for line in done.stdout.splitlines() if line.strip()]
    return [Listed(job, state, reason, Path(folder)) for job, state, reason, folder in rows]


def mine(prefix: str) -> dict[str, str]:
    """Id → name of this user's jobs whose names start with ``prefix``; empty if squeue does not respond."""
    done = _call("squeue", "--noheader", f"--user={_user()}", "--format=%i|%j")
    rows = (line.strip().split("|", 1) for line in done.stdout.splitlines() if "|" in line)
    return {job: name for job, name in rows if name.startswith(prefix)}


def state(job: str) -> State | None:
    """A job's state; None if Slurm does not know the job, or does not respond.

    The queue is queried first, then the controller's memory, then accounting, which many sites lack.
    """
    done = _call("squeue", "--noheader", f"--jobs={job}", "--states=all", "--format=%T|%r")
    line = done.stdout.strip().partition("\n")[0]
    if done.returncode == 0 and line:
        found = State(*line.split("|", 1))
        if not found.is_over:
            return found
    done = _call("scontrol", "show", "job", "-o", job)
    fields = dict(re.findall(r"(\w+)=(\S*)", done.stdout))
    if done.returncode == 0 and "JobState" in fields:
        return State(fields["JobState"], fields.get("Reason", ""), fields.get("ExitCode", ""))
    done = _call("sacct", "-X", "-n", "-P", "-j", job, "-o", "State,ExitCode")
    line = done.stdout.strip().rpartition("\n")[2]
    if done.returncode == 0 and "|" in line:
        name, exit_code = line.split("|", 1)
        return State(name.split()[0], exit_code=exit_code)  # "CANCELLED by 1000"
    return None


def cancel(jobs: Sequence[str]) -> None:
    """Asks Slurm to end jobs; they remain for a moment.

    Raises:
        SlurmSilent: scancel failed.
    """
    done = _call("scancel", *jobs)
    if done.returncode != 0 and "Invalid job id" not in done.stderr:
        raise SlurmSilent(f"scancel: {_words(done.stderr)}")


def options(settings: SlurmNode) -> list[str]:
    """The resources a job requests, as options of sbatch and srun."""
    wanted = {
        "partition": settings.partition,
        "gpus-per-node": settings.gpus_per_node or None,
        "cpus-per-task": settings.cpus_per_task,
        "time": settings.time_limit,
        "account": settings.account,
        "qos": settings.qos,
    }
    given = [f"--{option}={value}" for option, value in wanted.items() if value is not None]
    return [*given, *settings.extra]


def check_slurm(settings: SlurmNode, field: str = "training") -> str:
    """Checks that this machine can submit such a job; returns a summary.

    Args:
        field: the section of the experiment, for errors.

    Raises:
        SettingsError: no Slurm here, no response, no such partition, or too few nodes in it.
    """
    missing = [command for command in COMMANDS if shutil.which(command) is None]
    if missing:
        raise SettingsError(
            f"{field}.launcher: slurm needs {', '.join(missing)} on the PATH; run textalign (and Dagster) on a login "
            "node of the cluster, or set it to local"
        )
    found = partitions(field)
    default = next((name for name, (_, is_default) in found.items() if is_default), None)
    partition = settings.partition or default
    if partition is None:
        raise SettingsError(f"{field}.slurm.partition: the cluster has no default; one of {', '.join(found)}")
    if settings.partition is not None and settings.partition not in found:
        raise SettingsError(
            f"{field}.slurm.partition: no {settings.partition!r} here; one of {', '.join(found)}"
            f"{nearest(settings.partition, tuple(found))}"
        )
    nodes, available = settings.nodes if isinstance(settings, Slurm) else 1, found[partition][0]
    if nodes > available:
        raise SettingsError(
            f"{field}.slurm.nodes: {nodes}, but partition {partition} has {available}; lower it"
        )
    return f"slurm: {nodes} of {available} nodes of partition {partition}"


def partitions(field: str = "training") -> dict[str, tuple[int, bool]]:
    """Partition name → number of nodes, and whether it is the default.

    Raises:
        SettingsError: sinfo does not respond.
    """
    done = _call("sinfo", "--noheader", "--summarize", "--format=%P|%D")
    if done.returncode != 0:
        raise SettingsError(
            f"{field}.launcher: slurm does not respond (sinfo: {_words(done.stderr)}); is slurmctld up?"
        )
    rows = [line.strip().split("|") for line in done.stdout.splitlines() if "|" in line]
    return {name.rstrip("*"): (int(nodes), name.endswith("*")) for name, nodes in rows}


def inherited(environment: Mapping[str, str]) -> dict[str, str]:
    """The part of an environment that a job gets: no secrets, and nothing of a job that this process runs in."""
    return {name: value for name, value in environment.items() if KEPT.fullmatch(name)}


def _call(*command: str) -> subprocess.CompletedProcess[str]:
    if shutil.which(command[0]) is None:
        return subprocess.CompletedProcess(command, 127, "", f"{command[0]} is not installed")
    try:
        return subprocess.run(
            command,
            env=inherited(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no response within {PATIENCE:g} s")


def _user() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container whose user has no name
        return str(os.getuid())


def _words(text: str) -> str:
    """A command's error message, on one line."""
    lines = [re.sub(r"^\w+: (error: )?", "", line.strip()) for line in text.splitlines() if line.strip()]
    return "; ".join(lines) or "no reason given"
