"""Python programs in processes that are forked from one which has imported the large libraries already.

Importing them takes six seconds, and most tests need a second's work of them. Nothing that is imported starts a
thread that a forked process would miss. Tests of how a program starts do not use this.

As a program, it is the server: ``python -m tests.forked SOCKET``. Each request forks a process.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from resources.workers.serving import die_with_parent

LIBRARIES = (
    *("duckdb", "dagster", "pydantic", "jinja2.sandbox", "rich.console", "openai", "matplotlib.pyplot"),
    *("dagster._core.storage.sqlite_storage", "dagster._daemon", "dagster_pipes", "watchdog.observers"),
    *("torch", "torch.distributed", "safetensors.torch", "accelerate", "accelerate.commands.launch", "peft"),
    *("transformers", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"),
    *("transformers.trainer", "deepspeed"),
    *("transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2"),
)
PROJECT = "tests.integration.quick"
"""Imported, too: it reads no variables when it is imported, as the definitions do."""
HARMLESS = {"jemalloc_bg_thd", "polars-ooc-clea"}
"""Threads that forked processes can be without: allocators start theirs again, polars' deletes spilled data."""
ENGINE = ("vllm.v1.worker.cpu_worker", "xgrammar")
VLLM = {
    "resources.engines.vllm.worker": ("vllm.entrypoints.llm", *ENGINE),
    "tests.integration.vllm_server": ("vllm.entrypoints.openai.api_server", *ENGINE),
}
"""Program → libraries that are imported when it is started first."""
ADDRESS = "TEXTALIGN_TESTS_FORK_SERVER"
"""The variable with the server's socket, for processes that start others by it."""


def run(
    program: Sequence[str],
    arguments: Sequence[str],
    *,
    env: Mapping[str, str],
    cwd: Path,
    text: str,
    timeout: float,
    fork: bool = True,
) -> subprocess.CompletedProcess[str]:
    """As ``subprocess.run([python, *program, *arguments])``; ``program`` is a file, or -m and a module.

    fork: False: the process imports everything itself.
    """
    if not fork:
        command = [sys.executable, *program, *arguments]
        return subprocess.run(
            command, env=env, cwd=cwd, input=text, capture_output=True, text=True, timeout=timeout
        )
    with contextlib.ExitStack() as files:
        given, out, error = (files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(3))
        given.write(text)
        given.seek(0)
        process = Process(program, arguments, env, cwd, [given, out, error])
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.kill(process.pid, signal.SIGKILL)
            raise
        out.seek(0)
        error.seek(0)
        return subprocess.CompletedProcess([*program, *arguments], code, out.read(), error.read())


class Process:
    """A process of the server's."""

    def __init__(
        self,
        program: Sequence[str],
        arguments: Sequence[str],
        env: Mapping[str, str],
        cwd: Path,
        files: Sequence[IO[Any]],
        session: bool = False,
    ) -> None:
        place = address()
        request = {
            "program": [*program],
            "arguments": [*arguments],
            "env": {**env, ADDRESS: place},
            "cwd": str(cwd),
            "session": session,
        }
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.connect(place)
        data = json.dumps(request).encode()
        socket.send_fds(self._socket, [_number(len(data))], [file.fileno() for file in files])
        self._socket.sendall(data)
        self.pid = _received(self._socket)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, as ``Popen.wait`` gives it."""
        if not select.select([self._socket], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        return _received(self._socket)


class Popen(Process):
    """As much of ``subprocess.Popen`` as a worker's channel and ``accelerate launch`` need, for a Python module."""

    def __init__(
        self,
        args: Sequence[str],
        *,
        env: Mapping[str, str],
        stdin: int | None = None,
        stdout: int | IO[Any] | None = None,
        stderr: IO[Any] | None = None,
        start_new_session: bool = True,
        **_: Any,
    ) -> None:
        self.stdin = self.stdout = None
        self._code: int | None = None
        self._waiting = threading.Lock()
        with contextlib.ExitStack() as ends:
            files: list[IO[Any]] = [sys.__stdin__, sys.__stdout__, stderr or sys.__stderr__]  # type: ignore[list-item]
            if stdin == subprocess.PIPE:
                given, self.stdin = (os.fdopen(end, mode) for end, mode in zip(os.pipe(), "rw", strict=True))
                files[0] = ends.enter_context(given)
            if stdout == subprocess.PIPE:
                self.stdout, out = (os.fdopen(end, mode) for end, mode in zip(os.pipe(), "rw", strict=True))
                files[1] = ends.enter_context(out)
            elif stdout is not None:
                files[1] = stdout  # type: ignore[assignment]
            module = args.index("-m")
            program, arguments = args[module : module + 2], args[module + 2 :]
            super().__init__(program, arguments, env, Path.cwd(), files, session=start_new_session)

    def wait(self, timeout: float | None = None) -> int:
        # The code is sent once, and two threads may wait for it.
        if not self._waiting.acquire(timeout=-1 if timeout is None else timeout):
            raise subprocess.TimeoutExpired("a forked process", timeout or 0)
        try:
            if self._code is None:
                self._code = super().wait(timeout)
            return self._code
        finally:
            self._waiting.release()

    def poll(self) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)
        return None

    def stop(self) -> None:
        """Kills it, and the processes of its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.wait()


WORKERS = {
    *(f"resources.engines.{engine}.worker" for engine in ("transformers", "vllm", "endpoints")),
    "resources.rewards.worker",
}


def worker(command: list[str], **options: Any) -> Any:
    """Stands in for ``subprocess.Popen`` where a channel starts its worker on this machine."""
    if command[0] != sys.executable or command[3] not in WORKERS:
        return subprocess.Popen(command, **options)
    settings = json.loads(command[4]) | {"parent": None}  # it is not a child of this process
    return Popen([*command[:4], json.dumps(settings)], **options)


CHANNEL = SimpleNamespace(Popen=worker, PIPE=subprocess.PIPE, TimeoutExpired=subprocess.TimeoutExpired)
"""Stands in for the module ``subprocess`` in `resources.workers.channel`."""
_servers: list[subprocess.Popen[bytes]] = []  # kept: the stdin of one that is collected would close


@functools.cache
def address() -> str:
    """The socket of the server, which is started by the first that needs it, and ends with it: its stdin closes."""
    if ADDRESS in os.environ:
        return os.environ[ADDRESS]
    path = Path(tempfile.mkdtemp(prefix="forks")) / "socket"
    command, pipe = [sys.executable, "-m", "tests.forked", str(path)], subprocess.PIPE
    server = subprocess.Popen(command, stdin=pipe, stdout=pipe, cwd=Path(__file__).parents[1])
    assert server.stdout is not None and server.stdout.readline() == b"ready\n", "no fork server"
    _servers.append(server)
    os.environ[ADDRESS] = str(path)
    return str(path)


def _number(value: int) -> bytes:
    return value.to_bytes(8, signed=True)


def _received(connection: socket.socket) -> int:
    return int.from_bytes(connection.recv(8, socket.MSG_WAITALL), signed=True)


def _serve(path: str) -> None:
    _import([*LIBRARIES, PROJECT])
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that wait for a process are waited for by nobody
    print("ready", flush=True)
    serving = os.getpid()
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        size, files, _, _ = socket.recv_fds(connection, 8, 3)
        with connection.makefile("rb") as stream:
            request = json.loads(stream.read(int.from_bytes(size)))
        _import(VLLM.pop(request["program"][-1], ()))
        if os.fork() == 0:
            die_with_parent(serving)
            listener.close()
            _answer(connection, files, request)
        for file in files:
            os.close(file)
        connection.close()
    shutil.rmtree(Path(path).parent)


def _import(libraries: Sequence[str]) -> None:
    gc.disable()  # it takes a fifth of the time of an import
    for library in libraries:
        # An extra may not be installed; DeepSpeed logs to stdout.
        with contextlib.suppress(ImportError), contextlib.redirect_stdout(sys.stderr):
            importlib.import_module(library)
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert {*threads} <= {*threads[:1], *HARMLESS}, f"a library has started a thread: {threads}"
    if "vllm.model_executor.models.registry" in sys.modules:
        # It would start a Python process that imports vLLM to look at a model's class.
        registry = sys.modules["vllm.model_executor.models.registry"]
        registry._run_in_subprocess = lambda inspect: inspect()  # type: ignore[attr-defined]
    gc.enable()
    gc.freeze()  # no forked process looks through all this for garbage


def _answer(connection: socket.socket, files: Sequence[int], request: dict[str, Any]) -> None:
    """Forks the process of a request, and answers with its id and, in the end, its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    answering = os.getpid()
    pid = os.fork()
    if pid == 0:
        die_with_parent(answering)
        connection.close()
        os._exit(_main(files, **request))
    with contextlib.suppress(BrokenPipeError):  # it is no longer wanted
        connection.sendall(_number(pid))
        _, status = os.waitpid(pid, 0)
        connection.sendall(_number(os.waitstatus_to_exitcode(status)))
    os._exit(0)


def _main(
    files: Sequence[int],
    program: list[str],
    arguments: list[str],
    env: dict[str, str],
    cwd: str,
    session: bool,
) -> int:
    if session:
        os.setsid()
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    sys.argv = [program[-1], *arguments]
    code: Any = 0
    try:
        if program[0] == "-m":
            sys.modules.pop(program[1], None)  # it would warn that this one is imported already
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(program[0], run_name="__main__")
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:  # noqa: BLE001 (as an interpreter does)
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(BrokenPipeError, ValueError):
            stream.flush()
    return code or 0


if __name__ == "__main__":
    _serve(sys.argv[1])
