"""Why a training on Slurm failed, in one sentence a person can act on."""

from __future__ import annotations

import re
import signal
from pathlib import Path

import dagster as dg

from resources.compute.slurm import State
from resources.launchers.failure import end_of_log, failure
from resources.launchers.pipes_messages import Heard
from resources.launchers.slurm_job import SNAPSHOTS, SlurmJob
from resources.launchers.slurm_script import NO_PYTHON, NOT_SHARED
from training.state.snapshot_folder import kept

KILLED = re.compile(r"Signal (\d+) \(SIG\w+\) received by PID")  # torchrun's message about a rank
MUCH = 200_000  # bytes at the end of a log that are searched for it


def slurm_failure(job: SlurmJob, job_id: str, state: State, heard: Heard, log: Path) -> dg.Failure:
    """The failure in one sentence: the trainer's message if any, the scheduler's state, the first node to fail."""
    end = job.ended()
    who, node = f"Slurm job {job_id}", job.failed_node()
    how = _how(node.code, end_of_log(log, MUCH)) if node else ""
    first = f"; node {node.name} failed first: {how}" if node else ""
    if node is not None and state.name == "FAILED" and node.code not in (NOT_SHARED, NO_PYTHON):
        reason = f"failed on node {node.name}: {how}"
    else:
        reason = reason_of(state, job.folder.parent.parent, end.code if end else None)
    last = f"; its last message: {heard.exception[1]}" if heard.exception else ""
    return failure(
        f"{who} {reason}{last}",
        heard,
        log,
        {
            "slurm job": dg.MetadataValue.text(job_id),
            "slurm state": dg.MetadataValue.text(str(state)),
            "folder": dg.MetadataValue.path(str(job.folder)),
        },
        left=kept(job.folder.parent / SNAPSHOTS),
        state=f"{who}: {state}{first}",
        trust_heard=state.name in ("FAILED", "COMPLETED"),
    )


def reason_of(state: State, root: Path, code: int | None) -> str:
    """Why a job failed whose trainer reported no error.

    Args:
        root: the folder that all nodes should see.
        code: the exit code that the job recorded, if any.
    """
    if state.name == "COMPLETED":
        return "ended with exit code 0, but the trainer did not report that it is done: it did not finish"
    if state.name == "UNKNOWN":
        return f"is lost: {state.reason}; if it still runs, the next run takes it over"
    known = {
        "CANCELLED": "was cancelled",
        "DEADLINE": "did not meet its deadline",
        "NODE_FAIL": "lost a node",
        "OUT_OF_MEMORY": "ran out of memory on a node: request more (training.slurm.extra: [--mem=…]) or lower "
        "training.batch_size",
        "PREEMPTED": "was preempted by another job",
        "TIMEOUT": "reached its time limit: raise training.slurm.time_limit",
    }
    if state.name in known:
        return f"{known[state.name]} ({state})"
    if code == NOT_SHARED or state.exit_code == "0:53":
        return (
            f"cannot see {root} on its nodes ({state}): set training.slurm.shared_folder (or TEXTALIGN_HOME) "
            "to a folder that this machine and all nodes mount under one path"
        )
    if code == NO_PYTHON:
        return f"found no Python on a node ({state}): install textalign on a file system that all nodes mount"
    return f"failed, and its trainer reported no error ({state})"


def _how(code: int, log: str) -> str:
    """How a node's command ended; torchrun reports signals only in the log."""
    killed = [number for number in map(int, KILLED.findall(log)) if number != signal.SIGTERM]
    number = killed[0] if killed else code - 128
    if number <= 0:
        return f"exit code {code}"
    return f"a process was killed by signal {number}{' (out of memory?)' if number == 9 else ''}"
