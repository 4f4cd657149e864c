"""Launchers: where a training runs. This one runs it on this machine, over Dagster Pipes.

Dagster's own subprocess client is not enough for trainings: a cancelled run leaves the launcher's
ranks alive, a launcher that exits with 0 although a rank died is believed, and custom messages
arrive only at the end.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import dagster as dg
from dagster_pipes import PipesDefaultMessageWriter

from resources.processes import Supervised

# Dagster calls a method of its own that it warns of, in each session.
warnings.filterwarnings(
    "ignore", message=r".*expected_writer_count", category=dg.PreviewWarning, module=r"dagster\."
)
OnProgress = Callable[[dict[str, Any]], None]
POLL = 0.05  # seconds between two looks for messages
TAIL = 2000  # bytes of a log that an error shows


@dataclass(frozen=True)
class Acceleration:
    """How ``accelerate launch`` starts a training on this machine."""

    processes: int = 1
    mixed_precision: str = "no"
    cpu: bool = False  # even where there is an accelerator
    threads: int | None = None  # of a process; None: torch's choice
    config_file: Path | None = None  # accelerate's own configuration (DeepSpeed, FSDP)
    deepspeed: bool = False  # whether it is one of DeepSpeed


def accelerate_command(settings: Acceleration) -> list[str]:
    """The command up to and including ``-m``: append the module and its arguments.

    ``accelerate.commands.launch`` is what ``accelerate launch`` runs, without importing the other
    subcommands (2 s less), and surely that of this environment. Every default is spelled out: it
    would otherwise be asked of the machine or of a user's accelerate configuration.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    if settings.config_file is not None:
        command += ["--config_file", str(settings.config_file)]
    command += ["--num_processes", str(settings.processes), "--num_machines", "1"]
    command += ["--mixed_precision", settings.mixed_precision, "--dynamo_backend", "no"]
    if settings.processes > 1 or settings.config_file is not None:
        # --cpu would silently start one process; port 0 is any free one.
        command += ["--main_process_port", "0", *(["--multi_gpu"] if settings.config_file is None else [])]
    else:
        command += ["--quiet", *(["--cpu"] if settings.cpu else [])]
    return [*command, "-m"]


def accelerate_env(settings: Acceleration) -> dict[str, str]:
    """Environment of a training: threads that do not spin, no network, no bars in the log."""
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
    """What became of a launched command that succeeded."""

    seconds: float
    done: dict[str, Any] | None  # the done marker, where one was asked for


@dataclass(frozen=True)
class LocalLauncher:
    """Runs a command on this machine; nobody of it is left when ``launch`` returns or raises."""

    grace: float = 10.0  # seconds between SIGTERM and SIGKILL

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
    ) -> Launched:
        """Runs the command to its end.

        Args:
            extras: for the child, in its Pipes context.
            env: added to this process's environment.
            on_progress: is given each ``{"progress": …}`` the child reports, as it comes, on another
                thread. What it raises stops nothing, and is raised here in the end.
            log: file to append stdout and stderr to; None: this process's own (a step's compute logs).
            done: the JSON file that the child writes last. It is removed first, and exit code 0 is
                not believed without it.

        Raises:
            dg.Failure: the command failed, with its own words where it had some; command, exit code
                and the end of the log are metadata.
        """
        if done is not None:
            done.unlink(missing_ok=True)
        heard = _Heard(on_progress)
        started = time.monotonic()
        with (
            dg.open_pipes_session(
                context=context,
                context_injector=dg.PipesTempFileContextInjector(),
                message_reader=_LiveReader(heard),
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
        # All messages have been read now.
        marker = _read_marker(done)
        if code != 0 or (done is not None and marker is None):
            raise _failure(command, code, heard, done, log)
        if heard.error is not None:
            raise heard.error
        return Launched(time.monotonic() - started, marker)


@contextmanager
def _opened(log: Path | None) -> Iterator[Any]:
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
    with nullcontext() if log is None else log.open("ab") as stream:
        yield stream


def _read_marker(done: Path | None) -> dict[str, Any] | None:
    if done is None or not done.is_file():
        return None
    return cast(dict[str, Any], json.loads(done.read_text(encoding="utf-8")))


def _failure(
    command: Sequence[str], code: int, heard: _Heard, done: Path | None, log: Path | None
) -> dg.Failure:
    words = shlex.join(command)
    metadata: dict[str, dg.MetadataValue] = {
        "command": dg.MetadataValue.text(words),
        "exit code": dg.MetadataValue.int(code),
    }
    if log is not None:
        metadata["log"] = dg.MetadataValue.path(str(log))
        metadata["end of log"] = dg.MetadataValue.md(f"```\n{_tail(log)}\n```")
    where = f"the log {log}" if log is not None else "this step's stderr"
    if heard.exception is not None:
        name, message = heard.exception
        metadata["exception"] = dg.MetadataValue.text(name)
        # Bad input is as bad the next time.
        return dg.Failure(f"{name}: {message}", metadata=metadata, allow_retries=name != "JobError")
    if code == 0:
        return dg.Failure(
            f"the command exited with 0 but did not write {done}: it did not finish; see {where}",
            metadata=metadata,
        )
    if code > 128:
        reason = f"the command was ended by signal {code - 128}"
        hint = " (out of memory?)" if code == 128 + 9 else ""
        return dg.Failure(f"{reason}{hint}; see {where}", metadata=metadata)
    return dg.Failure(f"the command exited with {code} and did not say why; see {where}", metadata=metadata)


def _tail(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - TAIL))
        return stream.read().decode(errors="replace")


@dataclass
class _Heard:
    """What the child said, as far as Dagster does not keep it."""

    on_progress: OnProgress
    exception: tuple[str, str] | None = None
    error: Exception | None = None

    def listen(self, message: Mapping[str, Any]) -> None:
        params = message.get("params") or {}
        if message["method"] == "closed" and params.get("exception"):
            name, text = (
                params["exception"].get("name") or "error",
                params["exception"].get("message") or "",
            )
            # Pipes sends what a traceback ends with: "package.module.Name: message".
            self.exception = (name, (text.partition(f"{name}: ")[2] or text).strip())
        payload = params.get("payload") if message["method"] == "report_custom_message" else None
        if isinstance(payload, dict) and "progress" in payload and self.error is None:
            try:
                self.on_progress(payload["progress"])
            except Exception as error:  # noqa: BLE001 the reader must go on: the child's last words come later
                self.error = error


class _LiveReader(dg.PipesMessageReader):
    """Reads the child's messages as they come, whole lines only.

    Dagster's reader of files takes half a line for a line when it looks while one is being written,
    and reads no more then: a busy machine would lose the child's last words.
    """

    def __init__(self, heard: _Heard):
        self._heard = heard

    @contextmanager
    def read_messages(self, handler: Any) -> Iterator[Any]:
        over = threading.Event()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "messages"
            path.touch()
            thread = threading.Thread(target=self._read, args=(path, handler, over), daemon=True)
            thread.start()
            try:
                yield {
                    PipesDefaultMessageWriter.FILE_PATH_KEY: str(path),
                    PipesDefaultMessageWriter.INCLUDE_STDIO_IN_MESSAGES_KEY: False,
                }
            finally:
                over.set()
                thread.join()

    def _read(self, path: Path, handler: Any, over: threading.Event) -> None:
        try:
            with path.open("rb") as stream:
                for line in whole_lines(stream, over):
                    message = json.loads(line)
                    self._heard.listen(message)
                    handler.handle_message(message)
        except Exception:  # noqa: BLE001 a thread has nobody to raise to
            handler.report_pipes_framework_exception("reader of the child's messages", sys.exc_info())

    def no_messages_debug_text(self) -> str:
        return "Attempted to read messages from a file that the child was told of."


def whole_lines(stream: IO[bytes], over: threading.Event) -> Iterator[bytes]:
    """Lines of a file that somebody appends to, each once its end is there; ends after ``over``."""
    line = b""
    while True:
        last = over.is_set()  # looked at first: what was written before it is still read
        line += stream.readline()
        if line.endswith(b"\n"):
            yield line
            line = b""
        elif last:
            return
        else:
            over.wait(POLL)
