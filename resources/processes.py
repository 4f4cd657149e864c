"""Process trees that cannot outlive whoever started them."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from resources import supervisor

MARGIN = 5.0  # seconds the supervisor gets beyond the grace before it is killed itself


class Supervised:
    """A command in its own session, under a supervisor (resources/supervisor.py).

    The command and everything it starts is ended (SIGTERM, ``grace`` seconds, SIGKILL) when
    ``stop`` is called, when its leader ends, and when this process dies, be it by SIGKILL.

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

    def wait(self, timeout: float | None = None) -> int:
        """The command's exit code (128 + n if signal n ended it).

        Raises:
            subprocess.TimeoutExpired: it is still running.
        """
        code = self.process.wait(timeout)
        return code if code >= 0 else 128 - code

    def stop(self) -> None:
        """Ends everybody; returns when they are gone. Can be called again, and after the end."""
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1
        try:
            self.process.wait(self.grace + MARGIN)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        # The supervisor leaves nobody behind, unless it was killed: then this does its work.
        supervisor.end(self.process.pid, self._mark, 0.0)
