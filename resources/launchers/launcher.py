"""Launchers: where training runs. The one in this module runs it on this machine, over Dagster Pipes.

Dagster's own subprocess client is not enough for training: a cancelled run leaves the launcher's ranks
alive, a launcher that exits with 0 although a rank died counts as a success, and custom messages
arrive only at the end.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import dagster as dg

from resources.compute.processes import Supervised
from resources.launchers.failure import failure
from resources.launchers.pipes_messages import POLL, FileReader, Heard, OnProgress
from training.state.snapshot_folder import kept

Folder = Callable[[str], Path]
"""Name → folder: ``job`` (what the trainer reads), ``model`` and ``beside`` (what it writes), and
``snapshots`` (what it resumes from when restarted)."""

NODE, HEAD, PORT = "$TEXTALIGN_NODE", "$TEXTALIGN_HEAD", "$TEXTALIGN_PORT"
"""Placeholders in a command that only its machine can fill in: its number, machine 0's address and port."""


@dataclass(frozen=True)
class Acceleration:
    """How ``accelerate launch`` starts a training."""

    processes: int = 1  # on all machines
    machines: int = 1
    mixed_precision: str = "no"
    cpu: bool = False  # even where there is an accelerator
    threads: int | None = None  # per process; None: torch's choice
    config_file: Path | None = None  # accelerate's own configuration (DeepSpeed, FSDP)
    deepspeed: bool = False  # whether that is for DeepSpeed


def accelerate_command(settings: Acceleration) -> list[str]:
    """The command up to and including ``-m``: append the module and its arguments.

    ``accelerate.commands.launch`` is what ``accelerate launch`` runs, without importing the other
    subcommands (2 s less), and certain to be that of this environment. Every default is spelled out:
    otherwise it would come from the machine or from the user's accelerate configuration.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if settings.config_file is not None:
        command += ["--config_file", str(settings.config_file)]
    command += ["--num_processes", str(settings.processes), "--num_machines", str(settings.machines)]
    command += ["--mixed_precision", settings.mixed_precision, "--dynamo_backend", "no"]
    if settings.machines > 1:
        # Without machine_rank each machine would silently train alone; "standard": this command runs
        # on each machine, where DeepSpeed would start the others itself (pdsh).
        command += ["--machine_rank", NODE, "--main_process_ip", HEAD, "--main_process_port", PORT]
        command += ["--rdzv_backend", "static"]
        command += ["--deepspeed_multinode_launcher", "standard"] if settings.deepspeed else []
    elif settings.processes > 1 or settings.config_file is not None:
        command += ["--main_process_port", "0"]  # any free one
    if settings.processes > 1 or settings.config_file is not None:
        # --cpu would silently start only one process.
        command += ["--multi_gpu"] if settings.config_file is None else []
    else:
        command += ["--quiet", *(["--cpu"] if settings.cpu else [])]
    return [*command, "-m"]


def accelerate_env(settings: Acceleration) -> dict[str, str]:
    """The environment of training: threads that do not spin, no network, no progress bars in the log."""
    env = {
        "GOMP_SPINCOUNT": "0",  # spinning OpenMP threads slow each other down severalfold on busy cores
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    if settings.threads is not None:
        env["OMP_NUM_THREADS"] = str(settings.threads)
    if settings.cpu and settings.deepspeed:
        env["DS_ACCELERATOR"] = "cpu"  # the other variable would silently train without DeepSpeed
    elif settings.cpu:
        env["ACCELERATE_USE_CPU"] = "true"
    return env


@dataclass(frozen=True)
class Launched:
    """The outcome of a launched command that succeeded."""

    seconds: float
    done: dict[str, Any] | None  # the done marker, where one was requested


@dataclass(frozen=True)
class Work:
    """A training run, as passed to a launcher."""

    folder: Folder
    """Creates and returns the folders in which everything ends up."""
    unfinished: Path
    """Where the trainer's snapshots outlive it on this machine; other launchers have their own folder."""
    write: Callable[[Folder], list[str]]
    """Writes what the trainer reads into the folder ``job``; returns the command. It is passed the
    folders in which the trainer will work, which may differ from these."""
    extras: Mapping[str, Any]  # for the trainer, in its Pipes context
    env: Mapping[str, str]  # added to the environment
    on_progress: OnProgress
    log: Path  # file to append stdout and stderr to

    def place(self, name: str) -> Path:
        """The folder of that name for a trainer that works on this machine's files."""
        return self.unfinished if name == "snapshots" else self.folder(name)


class Launcher(Protocol):
    """Where a training runs."""

    def train(self, context: dg.AssetExecutionContext, work: Work) -> Launched:
        """Trains to the end; see `LocalLauncher.launch`."""
        ...


@dataclass(frozen=True)
class LocalLauncher:
    """Runs a command on this machine; none of its processes is left when ``launch`` returns or raises."""

    grace: float = 10.0  # seconds between SIGTERM and SIGKILL

    def train(self, context: dg.AssetExecutionContext, work: Work) -> Launched:
        """See `Launcher`."""
        command = work.write(work.place)
        return self.launch(
            context,
            command,
            work.extras,
            work.env,
            work.on_progress,
            log=work.log,
            done=work.folder("model") / "done.json",
            unfinished=work.unfinished,
        )

    def launch(
        self,
        context: dg.AssetExecutionContext | dg.OpExecutionContext,
        command: Sequence[str],
        extras: Mapping[str, Any],
        env: Mapping[str, str],
        on_progress: OnProgress,
        *,
        log: Path | None = None,
        done: Path | None = None,
        unfinished: Path | None = None,
    ) -> Launched:
        """Runs the command to its end.

        Args:
            extras: for the child, in its Pipes context.
            env: added to this process's environment.
            on_progress: called with each ``{"progress": …}`` the child reports, as it arrives, on another
                thread. What it raises stops nothing, and is raised here at the end.
            log: file to append stdout and stderr to; None: this process's own (a step's compute logs).
            done: the JSON file that the child writes last. It is removed first, and exit code 0 is
                not a success without it.
            unfinished: the folder of its snapshots, which a failure mentions.

        Raises:
            dg.Failure: the command failed, with its own message if it had one; command, exit code and
                the end of the log are metadata.
        """
        if done is not None:
            done.unlink(missing_ok=True)
        heard = Heard(on_progress)
        started = time.monotonic()
        with (
            dg.open_pipes_session(
                context=context,
                context_injector=dg.PipesTempFileContextInjector(),
                message_reader=FileReader(heard, every=POLL),
                extras=dict(extras),
            ) as session,
            _opened(log) as stream,
        ):
            child = Supervised(
                command,
                env={**env, **session.get_bootstrap_env_vars()},
                grace=self.grace,
                stdout=stream,
                stderr=None if stream is None else subprocess.STDOUT,
            )
            try:
                code = child.wait()
            finally:  # also when the run is cancelled
                child.stop()
        # All messages have been read by now.
        marker = read_marker(done)
        if code != 0 or (done is not None and marker is None):
            facts = {
                "command": dg.MetadataValue.text(shlex.join(command)),
                "exit code": dg.MetadataValue.int(code),
            }
            left = kept(unfinished) if unfinished else ""
            raise failure(_reason(code, done), heard, log, facts, left=left)
        if heard.error is not None:
            raise heard.error
        return Launched(time.monotonic() - started, marker)


def _opened(log: Path | None) -> AbstractContextManager[Any]:
    if log is None:
        return nullcontext()
    log.parent.mkdir(parents=True, exist_ok=True)
    return log.open("ab")


def read_marker(done: Path | None) -> dict[str, Any] | None:
    """The done marker, which the trainer writes last; None if it did not."""
    if done is None or not done.is_file():
        return None
    return cast(dict[str, Any], json.loads(done.read_text(encoding="utf-8")))


def _reason(code: int, done: Path | None) -> str:
    if code == 0:
        return f"the command exited with 0 but did not write {done}: it did not finish"
    if code > 128:
        hint = " (out of memory?)" if code == 128 + 9 else ""
        return f"the command was killed by signal {code - 128}{hint}"
    return f"the command exited with {code} and reported no error"


def told_seconds(done: Mapping[str, Any]) -> float:
    """The trainer's own timings, summed, in seconds."""
    return float(sum((done.get("seconds") or {}).values()))
