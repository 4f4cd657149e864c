"""The worker's side of a `worker.Channel`: calls as JSON lines on stdin, messages on stdout.

Each line in is a call; each line out is {"ready": …} (once, first), {"progress": [done, total]},
{"result": …} or {"error": sentence}. What libraries print goes to stderr. The process ends when stdin
ends, or with its parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any, TextIO

Send = Callable[[dict[str, Any]], None]


class CallError(Exception):
    """A call cannot be done; the message is for the user."""


def protocol() -> tuple[queue.SimpleQueue[dict[str, Any]], Send]:
    """Calls as they arrive, and a function to send a message.

    The channel moves to private file descriptors: whatever a library prints, or reads from stdin,
    cannot touch it.
    """
    source = os.fdopen(os.dup(0), encoding="utf-8")
    sink = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    calls: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    threading.Thread(target=listen, args=(source, calls), daemon=True).start()

    def send(message: dict[str, Any]) -> None:
        try:
            sink.write(json.dumps(message) + "\n")
            sink.flush()
        except BrokenPipeError:
            os._exit(0)

    return calls, send


def listen(source: TextIO, calls: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Queue the calls; when the parent closes its end or is gone, end at once, work or not."""
    for line in source:
        calls.put(json.loads(line))
    os._exit(0)


def die_with_parent(parent: int) -> None:
    """Have Linux kill this process with its parent, also while no end of stdin can be read."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(0)
