"""Python programs in processes that are forked from one which has imported the large libraries already.

Importing them takes six seconds, and most tests need a second's work of them. Nothing that is imported starts a
thread, which a forked process would lack, but for the allocators', which forked processes start again. Tests of how a
program starts do not use this.

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
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

LIBRARIES = (
    *("duckdb", "dagster", "pydantic", "jinja2.sandbox", "rich.console", "openai", "matplotlib.pyplot"),
    *("dagster._core.storage.sqlite_storage", "dagster._daemon", "dagster_pipes", "watchdog.observers"),
    *("torch", "torch.distributed", "safetensors.torch", "accelerate", "accelerate.commands.launch", "peft"),
    *("transformers", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto"),
    *("transformers.trainer", "deepspeed"),
    *("transformers.models.llama.modeling_llama", "transformers.models.gpt2.modeling_gpt2"),
)
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
    """As much of ``subprocess.Popen`` as a worker's channel needs, for ``[python, -P, -m, MODULE, …]``."""

    def __init__(self, command: Sequence[str], *, stderr: IO[Any], env: Mapping[str, str], **_: Any) -> None:
        given, self.stdin = (os.fdopen(end, mode) for end, mode in zip(os.pipe(), "rw", strict=True))
        self.stdout, out = (os.fdopen(end, mode) for end, mode in zip(os.pipe(), "rw", strict=True))
        with given, out:
            super().__init__(command[2:4], command[4:], env, Path.cwd(), [given, out, stderr], session=True)
        self._code: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self._code is None:
            self._code = super().wait(timeout)
        return self._code


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
    for library in LIBRARIES:
        # An extra may not be installed; DeepSpeed logs to stdout.
        with contextlib.suppress(ImportError), contextlib.redirect_stdout(sys.stderr):
            importlib.import_module(library)
    threads = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    assert {*threads} <= {*threads[:1], "jemalloc_bg_thd"}, f"a library has started a thread: {threads}"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(64)
    gc.freeze()  # no forked process looks through it for garbage
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # those that wait for a process are waited for by nobody
    print("ready", flush=True)
    while sys.stdin not in select.select([listener, sys.stdin], [], [])[0]:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            _answer(connection)
        connection.close()
    shutil.rmtree(Path(path).parent)


def _answer(connection: socket.socket) -> None:
    """Forks the process of a request, and answers with its id and, in the end, its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    size, files, _, _ = socket.recv_fds(connection, 8, 3)
    with connection.makefile("rb") as stream:
        request = json.loads(stream.read(int.from_bytes(size)))
    pid = os.fork()
    if pid == 0:
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
