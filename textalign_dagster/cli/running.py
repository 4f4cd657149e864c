"""Runs iterations in this process, through Dagster: the same job and events as from the UI."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import uuid4

import dagster as dg
from dagster._core.instance import InstanceRef
from rich.console import Console

from resources.freshness import Freshness
from resources.store import ArtifactError, ArtifactStore
from textalign_dagster import PROJECT
from textalign_dagster.cli.console import ProgressLines
from textalign_dagster.experiment.files import Library, home
from textalign_dagster.loop.abandoned import RETRY_TAG, active_runs, process_tag, release_abandoned
from textalign_dagster.loop.partitions import Cell
from textalign_dagster.progress import shown_by
from textalign_dagster.settings import SettingsError

INTERRUPTED = "DagsterExecutionInterruptedError"


class RunFailed(Exception):
    """An iteration failed; the message is that of the failed stage."""


@contextmanager
def dagster_instance() -> Iterator[dg.DagsterInstance]:
    """The instance of ``$DAGSTER_HOME`` if that is set, else the one that `dagster dev` uses in the project."""
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
    """Materializes iterations in order, skipping those that are up to date."""

    instance: dg.DagsterInstance
    store: ArtifactStore
    experiments: Library
    console: Console
    retry_before: datetime | None = None  # judge calls that failed before this time are retried

    def run(self, names: Sequence[str], iterations: int | None = None) -> None:
        """Runs iterations 1 … K of the experiments, alternating between experiments.

        Raises:
            RunFailed: a stage failed, or a blocking check did.
            SettingsError: another process is running an experiment.
        """
        lasts = {name: self.experiments.load(name).iterations for name in names}
        counts = {name: min(iterations or last, last) for name, last in lasts.items()}
        for name in names:
            release_abandoned(self.instance, name)
            running = active_runs(self.instance, name)
            if running:
                raise SettingsError(
                    f"{name} is already running (run {running[0].run_id[:8]}); wait for it, or cancel it in the UI"
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

        freshness = Freshness(self.store, cell.experiment, self.experiments.load(cell.experiment))
        try:
            fresh = freshness.iteration(cell.iteration).kind == "fresh"
        except ArtifactError:
            fresh = False  # the stage recomputes it, or reports what is wrong
        if (
            fresh
            and not self._retries(freshness, cell)
            and str(cell.key) in self.instance.get_materialized_partitions(evaluation.key)
        ):
            self.console.print(f"[dim]{cell.key}  up to date[/dim]", highlight=False)
            return
        run_id = str(uuid4())
        retry = {} if self.retry_before is None else {RETRY_TAG: self.retry_before.isoformat()}
        result = defs.resolve_job_def(iteration_job.name).execute_in_process(
            run_id=run_id,
            partition_key=cell.key,
            instance=self.instance,
            raise_on_error=False,
            tags={**process_tag(run_id), **retry},
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
        if _interrupted(result):
            raise KeyboardInterrupt
        if not result.success:
            raise RunFailed(f"{cell.key}: {_why(result)}")

    def _retries(self, freshness: Freshness, cell: Cell) -> bool:
        """Whether a cell has failed judge calls that should be retried."""
        from assets.verdicts import has_failed

        if self.retry_before is None:
            return False
        experiment = freshness.experiment
        at = [(cell.iteration, "feedback")] if experiment.judge else []
        if experiment.evaluating_judges:
            at += [(k, "evaluation") for k in ([0, 1] if cell.iteration == 1 else [cell.iteration])]
        found = [freshness.pointer(iteration, stage) for iteration, stage in at]
        return any(pointer is not None and has_failed(pointer.artifact) for pointer in found)


def _interrupted(result: dg.ExecuteInProcessResult) -> bool:
    """Whether the run was ended by Ctrl-C, which Dagster reports as a failed step."""
    errors = [event.step_failure_data.error for event in result.get_step_failure_events()]
    return any(error is not None and error.cls_name == INTERRUPTED for error in errors)


def _why(result: dg.ExecuteInProcessResult) -> str:
    """The failed stage's error message, or the descriptions of the checks that blocked the run."""
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
