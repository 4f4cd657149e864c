"""Calls to a worker process that holds what is heavy (torch, GPU memory). This side imports no torch.

    channel = Channel("resources.engines.transformers.worker", {"dtype": "float32"}, error=SamplerError)
    rows = channel.call({"op": "generate", ...}, progress)
    channel.close()

The worker is a module of this package whose ``main`` uses `serving.begin`. It starts on the first
call, serves any number of calls, one at a time, and exits, freeing its memory, when the channel is
closed, a call is interrupted, or this process dies.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from typing import IO, Any

from resources.workers.host import Host
from textalign_dagster import PROJECT

CLOSE_SECONDS = 5.0  # for a worker to exit by itself
STDERR_TAIL = 2000  # characters of a dead worker's stderr that are shown

Progress = Callable[[int, int], None]
"""Called with (done, total); what is in flight counts pro rata."""


class Channel:
    """Calls to one worker, which is started by the first of them.

    module: the worker, a module of this package.
    settings: JSON-able; passed to the worker in ``sys.argv[1]``, along with ``parent`` (this process' id).
    error: raised, with a sentence, when a call cannot be done or the worker has died.
    what: the worker's name in errors.
    threads: OMP_NUM_THREADS of the worker; None: this process' value, else its number of processors.
    offline: whether the model hub is disabled (models are local folders).
    environment: variables for the worker, which override this process' own.
    host: where the worker runs; None: on this machine.
    """

    def __init__(
        self,
        module: str,
        settings: Mapping[str, Any],
        *,
        error: type[Exception],
        what: str = "worker",
        threads: int | None = None,
        offline: bool = True,
        environment: Mapping[str, str] | None = None,
        host: Host | None = None,
    ) -> None:
        self.module, self.settings, self.error, self.what = module, dict(settings), error, what
        self.threads, self.offline = threads, offline
        self.environment = dict(environment or {})
        self.host = host
        self.ready: dict[str, Any] | None = None  # what the worker reported when it had started
        # Of the last call, until its work began: starting the worker, loading the model.
        self.load_seconds = 0.0
        self.worker: Worker | None = None  # None if none is running
        self._one_call = threading.Lock()

    def call(self, call: Mapping[str, Any], progress: Progress | None = None) -> Any:
        """The result of one call, JSON in and out.

        Raises:
            the channel's ``error``: the call cannot be done, or the worker cannot start or has died.
        """
        with self._one_call:
            started, begun = time.monotonic(), False
            try:
                if self.worker is None:
                    self.worker = Worker(self)
                    self.ready = self.worker.receive()["ready"]
                self.worker.send(call)
                while True:
                    message = self.worker.receive()
                    if not begun:
                        self.load_seconds, begun = time.monotonic() - started, True
                    if "progress" in message:
                        if progress is not None:
                            progress(*message["progress"])
                    elif "error" in message:
                        break
                    else:
                        return message["result"]
            except BaseException:  # an interrupted call must not continue computing
                worker, self.worker = self.worker, None
                if worker is not None:
                    worker.kill()
                raise
        raise self.error(message["error"])

    def close(self) -> None:
        """Stop the worker; a later call starts another."""
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.close()


class Worker:
    """A worker process in its own process group, and the two ends of its channel.

    The thread that starts it also reads from it until it ends: Linux ties the parent-death signal to the
    thread that started a process, which must therefore outlive it.
    """

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the worker)
        self.messages: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self.process: subprocess.Popen[str]
        self.job = ""  # the name of its job, on a host that has jobs
        started: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()
        self.reader = threading.Thread(target=self._read, args=(started,), name=channel.what, daemon=True)
        self.reader.start()
        failure = started.get()
        if failure is not None:
            raise channel.error(f"the {channel.what} cannot be started: {failure}") from failure

    def _read(self, started: queue.SimpleQueue[Exception | None]) -> None:
        host = self.channel.host
        threads = self.channel.threads or os.environ.get("OMP_NUM_THREADS")
        paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {
            "PYTHONPATH": os.pathsep.join(paths),
            # Threads that spin while they wait make each other several times slower on busy cores.
            "GOMP_SPINCOUNT": "0",
            "TOKENIZERS_PARALLELISM": "false",
            **({"HF_HUB_OFFLINE": "1"} if self.channel.offline else {}),
            **self.channel.environment,
        }
        # A process on another machine cannot check whether this one is alive.
        settings = json.dumps({**self.channel.settings, "parent": os.getpid() if host is None else None})
        # -P: a folder named like this package in the working directory is not imported instead.
        command = [sys.executable, "-P", "-m", self.channel.module, settings]
        if host is None:
            environment = {**os.environ, "OMP_NUM_THREADS": str(threads or processors()), **environment}
        else:
            if threads or host.cpus:
                environment["OMP_NUM_THREADS"] = str(threads or host.cpus)
            try:
                self.job, command, own = host.start(command, environment)
            except Exception as error:  # noqa: BLE001 (raised in the thread that waits for the worker)
                started.put(error)
                return
            environment = {**os.environ, "PYTHONPATH": environment["PYTHONPATH"]} if own is None else own
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.stderr,
                env=environment,
                encoding="utf-8",
                start_new_session=True,
            )
        except OSError as error:
            started.put(error)
            return
        started.put(None)
        assert self.process.stdout is not None
        with contextlib.suppress(ValueError):  # a last line truncated by the worker's death
            for line in self.process.stdout:
                self.messages.put(json.loads(line))
        self.messages.put(None)
        self.process.wait()

    def send(self, call: Mapping[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(call) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def receive(self) -> dict[str, Any]:
        """The next message; raises the channel's error if the worker has ended instead."""
        message = self.messages.get()
        if message is None:
            raise self._death()
        return message

    def close(self) -> None:
        """Let the worker exit by itself, or kill it after `CLOSE_SECONDS`."""
        self._hang_up()
        try:
            self.process.wait(CLOSE_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self._release()

    def kill(self) -> None:
        """Kill the worker and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if self.channel.host is not None:
            self.channel.host.end(self.job)
        self._hang_up()
        self._release()

    def _hang_up(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def _release(self) -> None:
        self.reader.join()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.stderr.close()

    def _death(self) -> Exception:
        code = self.process.wait()
        if self.channel.host is not None and code - 128 in {*signal.Signals}:
            code = 128 - code  # the worker was killed there
        if code < 0:
            how = f"was killed by {signal.Signals(-code).name}"
            how += " (often for lack of memory)" if -code == signal.SIGKILL else ""
        else:
            how = f"ended with exit code {code}"
        self.stderr.seek(max(0, self.stderr.seek(0, os.SEEK_END) - STDERR_TAIL))
        tail = self.stderr.read().decode(errors="replace").strip()
        return self.channel.error(f"the {self.channel.what} {how}; its last output: {tail or '(none)'}")


def processors() -> int:
    """The number of processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on Linux
        return os.cpu_count() or 1
