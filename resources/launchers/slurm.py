"""Training as jobs of a Slurm cluster, over Dagster Pipes through files on a shared file system.

A job belongs to what it trains, not to the process that submitted it: that process may die or be
restarted, and any process with the same training continues with the existing job. Only a user who
cancels the run ends it.

A job has succeeded only if job and trainer agree: exit code 0, and the marker the trainer writes last
in the same life. An unknown state is never a success.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import dagster as dg
from dagster._core.errors import DagsterExecutionInterruptedError

from resources.compute import slurm
from resources.launchers.launcher import Folder, Launched, Work, read_marker
from resources.launchers.pipes_messages import Heard
from resources.launchers.slurm_failure import slurm_failure
from resources.launchers.slurm_job import DONE, SNAPSHOTS, Follower, SlurmJob, each_launch, ended
from resources.launchers.slurm_script import job_script, node_script
from textalign_dagster import PROJECT
from textalign_dagster.ids import content_hash
from textalign_dagster.progress import somebody_waits
from textalign_dagster.settings import SettingsError
from textalign_dagster.settings.clusters import Slurm

WARNING = 120  # seconds before its time limit, for training to take a last snapshot
LOOK = 0.2  # seconds between polls for messages
CANCELLING = (dg.DagsterRunStatus.CANCELING, dg.DagsterRunStatus.CANCELED)


@dataclass(frozen=True)
class SlurmLauncher:
    """One training job on Slurm."""

    settings: Slurm
    key: str  # of what is trained: the same key is the same job
    title: str  # for people to read: which iteration it is
    root: Path  # shared by this machine and all nodes
    every: float = 5.0  # seconds between queries of the job's state
    patience: float = 600.0  # seconds for which the state may be unknown (slurmctld restarts meanwhile)
    settling: float = 60.0  # seconds for another machine's files to appear, or a cancelled job to disappear

    @property
    def name(self) -> str:
        """The job's name: the same for this training in this folder, whichever process submits it."""
        return f"textalign-{content_hash(str(self.root.resolve()), self.key)}"

    @property
    def folder(self) -> Path:
        """The folder of its submissions."""
        return self.root / self.name

    def train(self, context: dg.AssetExecutionContext, work: Work) -> Launched:
        """See `resources.launchers.launcher.Launcher`.

        Raises:
            SettingsError: it cannot be submitted.
            dg.Failure: it failed; with the trainer's message, if any, and the scheduler's state.
        """
        slurm.check_slurm(self.settings)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SettingsError(
                f"training.slurm.shared_folder: {self.root} cannot be written to ({error.strerror}); choose another"
            ) from None
        with _locked(self.folder / ".used", fcntl.LOCK_SH):
            return self._train(context, work)

    def _train(self, context: dg.AssetExecutionContext, work: Work) -> Launched:
        heard = Heard(work.on_progress)
        follower = Follower(heard, work.log)
        try:
            with dg.open_pipes_session(
                context=context,
                # In the environment: a file would be deleted when this process ends, not when the job does.
                context_injector=dg.PipesEnvContextInjector(),
                message_reader=follower,
                extras=dict(work.extras),
            ) as session:
                # Look and submit under one lock: of several processes with the same training, only one submits.
                with _locked(self.folder / ".submitting", fcntl.LOCK_EX):
                    job, job_id = self._find(context) or self._submit(
                        context, work.write, {**work.env, **session.get_bootstrap_env_vars()}
                    )
                follower.job = job
                state = self._follow(context, job, job_id, follower)
        except (KeyboardInterrupt, DagsterExecutionInterruptedError):
            self._interrupted(context)
            raise
        life = self._finished(job, state)
        if life is None:
            raise slurm_failure(job, job_id, state, heard, work.log)
        if heard.error is not None:
            raise heard.error
        job.hand_over(life, work.folder)
        end = ended(life)
        return Launched(end.seconds if end else 0.0, read_marker(life / DONE))

    def forget(self) -> None:
        """Removes the files of finished jobs; call it once the results are safe elsewhere."""
        if not self.folder.exists():
            return
        # Another process may be collecting the same results right now, or waiting for Slurm to clean up.
        with (
            suppress(slurm.SlurmSilent, BlockingIOError, FileNotFoundError),
            _locked(self.folder / ".used", fcntl.LOCK_EX | fcntl.LOCK_NB),
        ):
            if not slurm.listed(self.name):
                shutil.rmtree(self.folder, ignore_errors=True)

    def _find(self, context: dg.AssetExecutionContext) -> tuple[SlurmJob, str] | None:
        """The existing job, if it is pending, running, or has finished unseen."""
        deadline = time.monotonic() + self.settling
        while True:
            active = self._listed()
            # A completing job has failed, has finished, or will be requeued: that soon shows.
            if not any(job.state == "COMPLETING" for job in active) or time.monotonic() > deadline:
                break
            time.sleep(LOOK)
        for found in active:
            job = SlurmJob(found.folder)
            if found.state != "COMPLETING" and found.folder.parent == self.folder and found.folder.is_dir():
                context.log.info(
                    f"continuing with Slurm job {found.job} ({found.state}), submitted for the same training"
                )
                return job, found.job
        for job in each_launch(self.folder):
            if job.finished() is not None:
                context.log.info(f"Slurm job {job.job_id} finished in the meantime; its results are used")
                return job, job.job_id or "?"
        return None

    def _submit(
        self,
        context: dg.AssetExecutionContext,
        write: Callable[[Folder], list[str]],
        env: Mapping[str, str],
    ) -> tuple[SlurmJob, str]:
        settings = self.settings
        for old in each_launch(self.folder):  # failed, or never submitted
            shutil.rmtree(old.folder, ignore_errors=True)
        launch = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
        job = SlurmJob(self.folder / launch)
        (job.folder / "job").mkdir(parents=True)
        # Snapshots are shared by all lives and submissions; each life has its own results.
        shared = {"job": job.folder / "job", "snapshots": self.folder / SNAPSHOTS}
        command = write(lambda name: shared.get(name, Path(name)))
        path = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")]))
        script = job.folder / "job.sh"
        script.write_text(
            job_script(self.title, job.folder, nodes=settings.nodes, cpus_per_task=settings.cpus_per_task),
            encoding="utf-8",
        )
        (job.folder / "node.sh").write_text(
            node_script(self.title, job.folder, command, {**env, "PYTHONPATH": path}, settings.setup),
            encoding="utf-8",
        )
        options = self._options(job.folder)
        record = {"title": self.title, "name": self.name, "options": options, "command": command}
        (job.folder / "submission.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        # If this process is killed right here, the next one finds the job by its name.
        job_id = slurm.submit(self.name, options, script)
        job.record(job_id)
        context.log.info(f"submitted Slurm job {job_id}: {self.title}; its files are in {job.folder}")
        return job, job_id

    def _options(self, folder: Path) -> list[str]:
        return [
            f"--nodes={self.settings.nodes}",
            "--ntasks-per-node=1",
            f"--chdir={folder}",
            f"--output={folder}/log",
            "--open-mode=append",
            "--export=ALL",  # of sbatch's own environment, which is minimal
            "--requeue",
            f"--signal=USR1@{WARNING}",  # to the trainers, who then take a snapshot
            "--dependency=singleton",  # never two jobs of this name at a time
            *slurm.options(self.settings),
        ]

    def _follow(
        self, context: dg.AssetExecutionContext, job: SlurmJob, job_id: str, follower: Follower
    ) -> slurm.State:
        """Follows the job to its end; returns its last state."""
        queried, known, over, reported, had_ended = -math.inf, time.monotonic(), "", "", False
        finished = math.inf  # when it was first seen to have finished
        while True:
            follower.look()
            end = job.ended()
            # The scheduler is queried at once about a job that reports its own end.
            if time.monotonic() - queried < self.every and (end is None or had_ended):
                time.sleep(LOOK)
                continue
            queried, had_ended = time.monotonic(), end is not None
            state = slurm.state(job_id)
            if state is None:
                if end is not None:  # the scheduler has forgotten the job, but the job recorded its end
                    name = "COMPLETED" if end.code == 0 else "FAILED"
                    return slurm.State(name, exit_code=str(end.code))
                if time.monotonic() - known > self.patience:
                    return slurm.State("UNKNOWN", f"no answer about it for {self.patience:g} s")
                continue
            known = time.monotonic()
            if end is None or job.finished() is None:
                finished = math.inf
            else:
                finished = min(finished, time.monotonic())
            if not state.is_over and time.monotonic() - finished > self.settling:
                # A controller that crashed may hold a job without knowing that it ran.
                context.log.warning(
                    f"Slurm job {job_id} is {state}, but it has finished: its results are used"
                )
                with suppress(slurm.SlurmSilent):
                    slurm.cancel([job_id])
                return slurm.State("COMPLETED")
            if not state.is_over:
                over = ""
                if str(state) != reported:
                    reported = str(state)
                    held = "held" in state.reason.lower()
                    hint = (
                        f"; release it with `scontrol release {job_id}`, or cancel this run" if held else ""
                    )
                    context.log.log("WARNING" if held else "INFO", f"Slurm job {job_id}: {state}{hint}")
            elif state.name in slurm.REQUEUED_AFTER and over != state.name:
                over = state.name  # if the state is the same at the next query, it is not requeued
            else:
                return state

    def _finished(self, job: SlurmJob, state: slurm.State) -> Path | None:
        """The life with the results; another machine's files may take a while to appear."""
        if state.name != "COMPLETED":
            return None
        deadline = time.monotonic() + self.settling
        while (life := job.finished()) is None and time.monotonic() < deadline:
            time.sleep(LOOK)
        return life

    def _interrupted(self, context: dg.AssetExecutionContext) -> None:
        """Cancels the job if a user cancelled the run, but not if only this process has to end."""
        run = context.instance.get_run_by_id(context.run.run_id)
        if not somebody_waits() and (run is None or run.status not in CANCELLING):
            context.log.warning("leaving the Slurm job running; the next run of this iteration takes it over")
            return
        deadline = time.monotonic() + self.settling
        try:
            while active := slurm.listed(self.name):
                if time.monotonic() > deadline:
                    context.log.warning(
                        f"Slurm job {active[0].job} was cancelled and is still {active[0].state}"
                    )
                    return
                if ending := [job.job for job in active if job.state != "COMPLETING"]:
                    slurm.cancel(ending)
                time.sleep(LOOK)
        except slurm.SlurmSilent as error:
            context.log.error(f"the Slurm job could not be cancelled ({error}): scancel --name={self.name}")
            return
        context.log.info("the Slurm job is cancelled")

    def _listed(self) -> list[slurm.Listed]:
        try:
            return slurm.listed(self.name)
        except slurm.SlurmSilent as error:
            raise SettingsError(
                f"training.launcher: Slurm cannot be queried about {self.name} ({error})"
            ) from None


@contextmanager
def _locked(path: Path, how: int) -> Iterator[None]:
    with path.open("a") as lock:
        fcntl.flock(lock, how)
        yield
