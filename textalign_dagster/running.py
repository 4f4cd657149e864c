"""Runs iterations in this process, through Dagster: the same job and events as from the UI."""

import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.instance import InstanceRef
from rich.console import Console

from resources.freshness import Freshness
from resources.store import ArtifactStore
from textalign_dagster.console import ProgressLines
from textalign_dagster.library import PROJECT, Library, home
from textalign_dagster.partitions import Cell
from textalign_dagster.progress import shown_by
from textalign_dagster.settings import SettingsError

PROCESS_TAG = "textalign/process"


class RunFailed(Exception):
    """An iteration failed; the message is that of the failed stage."""


@contextmanager
def dagster_instance() -> Iterator[dg.DagsterInstance]:
    """``$DAGSTER_HOME``'s instance if that is set, else the one `dagster dev` shows in the project."""
    if os.environ.get("DAGSTER_HOME"):
        with dg.DagsterInstance.get() as instance:
            yield instance
        return
    base = home() / "dagster"
    base.mkdir(parents=True, exist_ok=True)
    here = {"base_dir": str(base)}
    overrides: dict[str, Any] = {
        "storage": {"sqlite": here},
        "local_artifact_storage": {
            "module": "dagster._core.storage.root",
            "class": "LocalArtifactStorage",
            "config": here,
        },
        "compute_logs": {
            "module": "dagster._core.storage.local_compute_log_manager",
            "class": "LocalComputeLogManager",
            "config": {"base_dir": str(base / "compute_logs")},
        },
        "telemetry": {"enabled": False},
    }
    ref = InstanceRef.from_dir(str(base), config_dir=str(PROJECT), overrides=overrides)
    with dg.DagsterInstance.from_ref(ref) as instance:
        yield instance


@dataclass
class Runner:
    """Materializes iterations in order; what is there and up to date is left alone."""

    instance: dg.DagsterInstance
    store: ArtifactStore
    library: Library
    console: Console

    def run(self, names: Sequence[str], iterations: int | None = None) -> None:
        """Runs iterations 1 … K of the experiments, side by side.

        Raises:
            RunFailed: a stage failed, or a blocking check did.
            SettingsError: an experiment is being run by somebody else.
        """
        counts = {name: iterations or self.library.load(name).iterations for name in names}
        for name in names:
            release_abandoned(self.instance, name)
            running = active_runs(self.instance, name)
            if running:
                raise SettingsError(
                    f"{name} is being run already (run {running[0].run_id[:8]}); wait for it, or cancel it in the UI"
                )
        with ProgressLines(self.console) as lines, shown_by(lines.show):
            for k in range(1, max(counts.values()) + 1):
                for name in names:
                    if k <= counts[name]:
                        self._cell(Cell(name, k))

    def _cell(self, cell: Cell) -> None:
        from assets.evaluation import evaluation
        from textalign_dagster.automation import iteration_job
        from textalign_dagster.definitions import defs

        freshness = Freshness(self.store, cell.experiment, self.library.load(cell.experiment))
        known = self.instance.get_materialized_partitions(evaluation.key)
        if freshness.iteration(cell.iteration).kind == "fresh" and str(cell.key) in known:
            self.console.print(f"[dim]{cell.key}  up to date[/dim]", highlight=False)
            return
        result = defs.resolve_job_def(iteration_job.name).execute_in_process(
            partition_key=cell.key,
            instance=self.instance,
            raise_on_error=False,
            tags={PROCESS_TAG: this_process()},
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
        if not result.success:
            raise RunFailed(f"{cell.key}: {_why(result)}")


def _why(result: dg.ExecuteInProcessResult) -> str:
    """The failed stage's own words, or those of the checks that stopped it."""
    refused = [
        f"{found.asset_key.to_user_string()}: check {found.check_name} failed: {found.description}"
        for found in result.get_asset_check_evaluations()
        if not found.passed and found.severity == dg.AssetCheckSeverity.ERROR
    ]
    if refused:
        return "; ".join(refused) + " (limits: `checks` in the experiment)"
    for event in result.get_step_failure_events():
        data = event.step_failure_data
        error = data.error
        while error is not None and error.cause is not None:
            error = error.cause
        if data.user_failure_data is not None and data.user_failure_data.description:
            return f"{event.step_key}: {data.user_failure_data.description}"
        if error is not None:
            return f"{event.step_key}: {error.message.strip()}"
    return "the run was cancelled"


def active_runs(instance: dg.DagsterInstance, experiment: str) -> Sequence[dg.DagsterRun]:
    """Runs of an experiment that are queued or under way."""
    from textalign_dagster.automation import ACTIVE, EXPERIMENT_TAG

    return instance.get_runs(dg.RunsFilter(tags={EXPERIMENT_TAG: experiment}, statuses=ACTIVE))


def release_abandoned(instance: dg.DagsterInstance, experiment: str) -> None:
    """Marks runs as failed whose process on this machine is gone (kill -9, power cut).

    Dagster's daemon looks after runs it launched; those of the command line have nobody else.
    """
    for run in active_runs(instance, experiment):
        process = run.tags.get(PROCESS_TAG)
        if process is not None and not _alive(process):
            instance.report_run_failed(run, "the process that ran it is gone")


def this_process() -> str:
    """host:pid:start, which tells a process from a later one with its number."""
    return f"{socket.gethostname()}:{os.getpid()}:{_started(os.getpid())}"


def _alive(process: str) -> bool:
    host, pid, started = process.rsplit(":", 2)
    return host != socket.gethostname() or _started(int(pid)) == started


def _started(pid: int) -> str:
    """When a process started, as its system counts; empty where it is gone or cannot be told."""
    try:
        state, *numbers = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state in "ZX" else numbers[18]  # a zombie is gone, only not yet reaped
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc").exists():
            return ""
        try:  # no /proc (macOS): the number must do
            os.kill(pid, 0)
        except ProcessLookupError:
            return ""
        except PermissionError:
            pass
        return "running"
