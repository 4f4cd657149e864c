"""Runs in progress, and those whose process died without reporting it."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

import dagster as dg

EXPERIMENT_TAG = "dagster/partition/experiment"
PROCESS_TAG = "textalign/process"
BATCHES_TAG = "textalign/waits_for_batches"
"""On a run whose judge calls went to a Batch API: the names of the jobs whose replies it needs."""
RETRY_TAG = "textalign/retry_failed_before"
"""On a run that retries judge calls that failed before this time (ISO 8601, with an offset)."""
ONE_PROCESS = ("in_process", "execute_in_process_executor")
ACTIVE = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]


def active_runs(instance: dg.DagsterInstance, experiment: str) -> Sequence[dg.DagsterRun]:
    """Runs of an experiment that are queued or under way."""
    return instance.get_runs(dg.RunsFilter(tags={EXPERIMENT_TAG: experiment}, statuses=ACTIVE))


def runs_under_way(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    """Runs of any experiment that are queued or under way, except those whose process is known to be gone."""
    runs = instance.get_runs(dg.RunsFilter(statuses=ACTIVE))
    return [run for run in runs if not _gone(run)]


def release_abandoned(instance: dg.DagsterInstance, experiment: str) -> None:
    """Marks runs whose process on this machine is gone (kill -9, power cut) as failed.

    The run queue would wait for them forever. Dagster's daemon notices when a process that it launched
    dies, but not those of the command line, nor those launched before the daemon was started.
    """
    for run in active_runs(instance, experiment):
        if _gone(run):
            instance.report_run_failed(run, "the process that ran it is gone")


def process_tag(run_id: str) -> dict[str, str]:
    """The tag that identifies the process of a run: run@host:pid:start.

    The start time distinguishes the process from a later one with the same pid; the run id is there
    because a re-execution inherits the tags of the original run.
    """
    pid = os.getpid()
    return {PROCESS_TAG: f"{run_id}@{socket.gethostname()}:{pid}:{_started(pid)}"}


def mark(context: dg.AssetExecutionContext) -> None:
    """Tags the run with this process, if all its steps run in it."""
    if context.job_def.executor_def.name not in ONE_PROCESS:
        return
    tag = process_tag(context.run.run_id)
    if context.run.tags.get(PROCESS_TAG) != tag[PROCESS_TAG]:
        context.instance.add_run_tags(context.run.run_id, tag)


def _gone(run: dg.DagsterRun) -> bool:
    """Whether a run's process is known to be gone: it was on this machine, and no longer exists."""
    marked, _, where = run.tags.get(PROCESS_TAG, "").partition("@")
    if marked != run.run_id:
        return False
    host, pid, started = where.rsplit(":", 2)
    return host == socket.gethostname() and _started(int(pid)) != started


def _started(pid: int) -> str:
    """A process's start time in clock ticks since boot, or "running" without /proc; empty if it is gone."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else numbers[18]  # a zombie has ended, but is not reaped yet
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc").exists():
            return ""
        try:  # no /proc (macOS): the pid must do
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            pass
        return "running"
