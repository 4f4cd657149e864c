"""Pipes messages of running training, read from a file as they arrive."""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
from dagster_pipes import PipesDefaultMessageWriter

# In each session, Dagster itself calls a preview method and warns about it.
warnings.filterwarnings(
    "ignore", message=r".*expected_writer_count", category=dg.PreviewWarning, module=r"dagster\."
)
OnProgress = Callable[[dict[str, Any]], None]
POLL = 0.05  # seconds between polls for messages
POLL_FILES = 0.2  # the same, where each poll opens a file on a network file system


@dataclass
class Heard:
    """What the child reported and Dagster does not keep."""

    on_progress: OnProgress
    exception: tuple[str, str] | None = None
    error: Exception | None = None

    def listen(self, message: Mapping[str, Any]) -> None:
        params = message.get("params") or {}
        if message["method"] == "closed" and params.get("exception"):
            name = params["exception"].get("name") or "error"
            text = params["exception"].get("message") or ""
            # Pipes sends what a traceback ends with: "package.module.Name: message".
            self.exception = (name, (text.partition(f"{name}: ")[2] or text).strip())
        payload = params.get("payload") if message["method"] == "report_custom_message" else None
        if isinstance(payload, dict) and "progress" in payload and self.error is None:
            try:
                self.on_progress(payload["progress"])
            except Exception as error:  # noqa: BLE001 the reader must continue: the child's last messages come later
                self.error = error


class FileReader(dg.PipesMessageReader):
    """Reads messages from a file as they arrive, whole lines only.

    Dagster's file reader mistakes a half-written line for a whole one, and reads nothing after it: on a busy machine,
    the child's last messages would be lost. The file is reopened for each poll, so that a network file system shows
    what another machine has written.

    path: None: a temporary file, for a child on this machine.
    every: seconds between polls.
    """

    def __init__(self, heard: Heard, path: Path | None = None, every: float = POLL_FILES):
        self._heard, self._path, self._every = heard, path, every

    @contextmanager
    def read_messages(self, handler: Any) -> Iterator[Any]:
        over = threading.Event()
        with tempfile.TemporaryDirectory() as folder:
            path = self._path or Path(folder) / "messages"
            thread = threading.Thread(target=self._read, args=(path, handler, over), daemon=True)
            thread.start()
            try:
                yield to_file(str(path))
            finally:
                over.set()
                thread.join()

    def _read(self, path: Path, handler: Any, over: threading.Event) -> None:
        try:
            for line in lines_of(path, over, self._every):
                message = json.loads(line)
                self._heard.listen(message)
                handler.handle_message(message)
        except Exception:  # noqa: BLE001 a thread cannot raise to its caller
            handler.report_pipes_framework_exception("reader of the child's messages", sys.exc_info())

    def no_messages_debug_text(self) -> str:
        return "Attempted to read messages from a file whose path the child was given."


def lines_of(path: Path, over: threading.Event, every: float) -> Iterator[bytes]:
    """Lines of a growing file, each once it is complete; ends after ``over`` is set."""
    read = 0
    while True:
        last = over.is_set()  # checked first: what was written before it was set is still read
        for line in new_lines(path, read):
            read += len(line)
            yield line
        if last:
            return
        over.wait(every)


def new_lines(path: Path, start: int) -> list[bytes]:
    """The complete lines of a file from byte ``start`` on; none if it does not exist yet."""
    try:
        with path.open("rb") as stream:
            stream.seek(start)
            return [line for line in stream if line.endswith(b"\n")]
    except FileNotFoundError:
        return []


def to_file(path: str) -> dict[str, Any]:
    """Pipes parameters that make a child write its messages to a file."""
    return {
        PipesDefaultMessageWriter.FILE_PATH_KEY: path,
        PipesDefaultMessageWriter.INCLUDE_STDIO_IN_MESSAGES_KEY: False,
    }
