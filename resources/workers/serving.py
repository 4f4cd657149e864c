"""The worker's side of a `channel.Channel`: calls as JSON lines on stdin, messages on stdout.

Each line in is a call; each line out is {"ready": …} (once, first), {"progress": [done, total]},
{"result": …} or {"error": sentence}. A worker that loads something for a call reports
a progress of 0 once it is loaded, so that loading and work can be timed separately. What libraries print
goes to stderr. The process ends when stdin ends, or with its parent.
"""

from __future__ import annotations

import ctypes
import json
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

PROGRESS_SECONDS = 0.2  # between two progress messages

Send = Callable[[dict[str, Any]], None]
Report = Callable[[float], None]
"""Called with how much of a call is done."""


class CallError(Exception):
    """A call cannot be done; the message is for the user."""


def begin() -> tuple[dict[str, Any], queue.SimpleQueue[dict[str, Any]], Send]:
    """The settings of this worker process, and its `protocol`; it ends with its parent."""
    settings = json.loads(sys.argv[1])
    die_with_parent(settings["parent"])
    calls, send = protocol()
    return settings, calls, send


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


def serve(
    calls: queue.SimpleQueue[dict[str, Any]], send: Send, answer: Callable[[dict[str, Any], Report], Any]
) -> None:
    """Answer the calls, one after the other, until this process ends.

    answer: computes the result of a call, and reports how much of the call's ``total`` is done; a
    `CallError` is sent to the caller, any other exception ends the process.
    """
    while True:
        call = calls.get()
        try:
            send({"result": answer(call, reporter(send, call["total"]))})
        except CallError as error:
            send({"error": str(error)})


def reporter(send: Send, total: int) -> Report:
    """A function that sends progress, at most every `PROGRESS_SECONDS` until the call is done."""
    last = 0.0

    def report(done: float) -> None:
        nonlocal last
        if done >= total or time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            send({"progress": [int(done), total]})

    return report


def quiet_transformers() -> None:
    """Keep progress bars and warnings of transformers out of the log."""
    from transformers import logging

    quiet: Any = logging
    quiet.set_verbosity_error()
    quiet.disable_progress_bar()


def reason(error: Exception, length: int = 400) -> str:
    """An exception's type and the beginning of its message, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:length]}"


def version_of(folder: Path) -> object:
    """A value that changes with any file of a folder: what was loaded from it is then stale."""
    files = sorted(
        (path.name, path.stat().st_size, path.stat().st_mtime_ns)
        for path in folder.iterdir()
        if path.is_file()
    )
    return (folder, files)


def listen(source: TextIO, calls: queue.SimpleQueue[dict[str, Any]]) -> None:
    """Queue the calls; when the parent closes its end or is gone, exit at once, even during work."""
    for line in source:
        calls.put(json.loads(line))
    os._exit(0)


def die_with_parent(parent: int | None) -> None:
    """Have Linux kill this process when its parent dies, even while it cannot read the end of stdin.

    parent: its process id; None: it is on another machine.
    """
    if parent is None:
        return
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != parent:  # it died before the line above
        os._exit(0)
