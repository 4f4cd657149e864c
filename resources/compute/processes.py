"""Process trees that cannot outlive the process that started them."""

from __future__ import annotations

import atexit
import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from resources.compute import supervisor

MARGIN = 5.0  # seconds the supervisor gets beyond the grace before it is killed itself


class Supervised:
    """A command in its own session, under a supervisor (resources/compute/supervisor.py).

    The command and everything it starts are ended (SIGTERM, ``grace`` seconds, SIGKILL) when
    ``stop`` is called, when the command ends, and when this process dies, even by SIGKILL.

    Args:
        env: added to this process's environment.
        stdin, stdout, stderr: as for subprocess.Popen; streams are inherited by default, except
            stdin, which is empty.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        grace: float = 10.0,
        cwd: Path | None = None,
        stdin: Any = subprocess.DEVNULL,
        stdout: Any = None,
        stderr: Any = None,
    ):
        self.grace = grace
        self._mark = uuid.uuid4().hex
        reading, self._lifeline = os.pipe()
        try:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-I",
                    "-S",
                    supervisor.__file__,
                    str(reading),
                    str(grace),
                    *command,
                ],
                env={**os.environ, **(env or {}), supervisor.MARK: self._mark},
                cwd=cwd,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
                pass_fds=[reading],
            )
        except BaseException:
            os.close(self._lifeline)
            raise
        finally:
            os.close(reading)
        # An interrupt can arrive between any two instructions, even before stop() is called.
        atexit.register(self._end)

    def wait(self, timeout: float | None = None) -> int:
        """The command's exit code (128 + n if signal n ended it).

        Raises:
            subprocess.TimeoutExpired: it is still running.
        """
        code = self.process.wait(timeout)
        return code if code >= 0 else 128 - code

    def stop(self) -> None:
        """Ends all processes and returns when they are gone. Can be called repeatedly, and after they ended.

        An interrupt (Ctrl-C, a cancelled run) is deferred until they are gone.
        """
        with _uninterrupted():
            self._end()
        atexit.unregister(self._end)

    def _end(self) -> None:
        lifeline, self._lifeline = self._lifeline, -1
        if lifeline >= 0:
            os.close(lifeline)
        try:
            self.process.wait(self.grace + MARGIN)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        # The supervisor leaves no process behind, unless it was itself killed: then this does its work.
        supervisor.end(self.process.pid, self._mark, 0.0)


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Defers SIGINT and SIGTERM: those that arrive meanwhile are raised again afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals interrupt the main thread only
        return
    received: list[int] = []
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    mine = {number: handler for number, handler in before.items() if callable(handler)}
    try:
        for number in mine:
            signal.signal(number, lambda number, _: received.append(number))
        yield
    finally:
        for number, handler in mine.items():
            signal.signal(number, handler)
    for late in received:
        signal.raise_signal(late)
