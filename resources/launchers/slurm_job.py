"""The folder of a training job on Slurm, and what it records: lives, messages, and how they ended.

Layout below the shared folder::

    {name}/snapshots/…                       what training of any launch and life resumes from
    {name}/{launch}/job/…                    what the trainer reads
    {name}/{launch}/job.sh, node.sh, log     scripts and output of all its lives
    {name}/{launch}/job_id, submission.json
    {name}/{launch}/{life}/                  0, and one more each time that Slurm restarts it:
        messages, model/, beside/            what the trainer writes (done.json last)
        node_0, …                            exit code and name of each node that has finished
        ended                                exit code and seconds, written by the job itself

``name`` is derived from what is trained, and is also the job's name in Slurm; a launch is one
submission. So another process with the same training finds the job, pending, running or finished.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from resources.launchers.launcher import Folder
from resources.launchers.pipes_messages import Heard, new_lines, to_file

LAUNCH = re.compile(r"\d{8}T\d{6}-[0-9a-f]{8}")
DONE = "model/done.json"
RESULTS = ("model", "beside")
MESSAGES = "messages"
SNAPSHOTS = "snapshots"
TERMINATED = 128 + signal.SIGTERM


@dataclass(frozen=True)
class Ended:
    """How a job ended, as recorded by the job itself."""

    code: int
    seconds: float


@dataclass(frozen=True)
class FailedNode:
    """The node that failed first; the others are terminated because of it."""

    name: str
    code: int


@dataclass(frozen=True)
class SlurmJob:
    """One submission."""

    folder: Path

    @property
    def job_id(self) -> str | None:
        """Slurm's job id; None if neither the submitter nor the job got to record it."""
        return _read(self.folder / "job_id") or None

    def record(self, job_id: str) -> None:
        """Records the job id."""
        (self.folder / "job_id").write_text(job_id, encoding="utf-8")

    def lives(self) -> list[Path]:
        """The folders of its lives, oldest first."""
        found = [path for path in self.folder.iterdir() if path.name.isdigit()]
        return sorted(found, key=lambda path: int(path.name))

    def ended(self) -> Ended | None:
        """How its last life ended; None if it recorded nothing."""
        lives = self.lives()
        return ended(lives[-1]) if lives else None

    def failed_node(self) -> FailedNode | None:
        """The node that failed first in its last life; None if unknown."""
        lives = self.lives()
        files = sorted(lives[-1].glob("node_*"), key=lambda path: path.stat().st_mtime_ns) if lives else []
        ends = [_read(path).split() for path in files]
        failed = [FailedNode(name, int(code)) for code, name in ends if int(code) not in (0, TERMINATED)]
        return failed[0] if failed else None

    def finished(self) -> Path | None:
        """The newest life that both job and trainer report as a success."""
        for life in reversed(self.lives()):
            end = ended(life)
            if end is not None and end.code == 0 and (life / DONE).is_file():
                return life
        return None

    def hand_over(self, life: Path, folder: Folder) -> None:
        """Copies what the job read, and wrote in a life, to its final folders; the originals stay here."""
        target = folder("job")
        shutil.copytree(self.folder / "job", target, dirs_exist_ok=True)
        for path in target.iterdir():
            if path.suffix in (".json", ".yaml"):  # these contain their own folder's path
                text = path.read_text(encoding="utf-8")
                path.write_text(text.replace(str(self.folder / "job"), str(target)), encoding="utf-8")
        for name in RESULTS:
            written = life / name
            if written.is_dir():
                shutil.copytree(written, folder(name), copy_function=_link, dirs_exist_ok=True)


class Follower(dg.PipesMessageReader):
    """Passes a job's messages to Dagster, and its output to a log, as they arrive.

    The messages of all lives are passed on in order, but only the first "opened", and only the last
    "closed", when the job is over. Files are reopened for each look, so that a network file system
    shows what another machine has written.
    """

    def __init__(self, heard: Heard, log: Path):
        self.job: SlurmJob | None = None  # set once there is one
        self._heard, self._log = heard, log
        self._life, self._read, self._logged = 0, 0, 0
        self._opened = False
        self._closed: dict[str, Any] | None = None
        self._handler: Any = None

    @contextmanager
    def read_messages(self, handler: Any) -> Iterator[Any]:
        self._handler = handler
        try:
            yield to_file(MESSAGES)
        finally:
            self.look()
            if self._closed is not None:
                handler.handle_message(self._closed)

    def look(self) -> None:
        """Reads new messages and output."""
        if self.job is None:
            return
        self._logged += _append(self.job.folder / "log", self._log, self._logged)
        last = int(lives[-1].name) if (lives := self.job.lives()) else 0
        self._messages(self.job)
        while self._life < last:  # everything written before a life ended has been read by now
            self._life, self._read, self._closed, self._heard.exception = self._life + 1, 0, None, None
            self._messages(self.job)

    def no_messages_debug_text(self) -> str:
        return "Attempted to read messages from a file in the job's folder."

    def _messages(self, job: SlurmJob) -> None:
        for line in new_lines(job.folder / str(self._life) / MESSAGES, self._read):
            self._read += len(line)
            message = json.loads(line)
            self._heard.listen(message)
            if message["method"] == "closed":
                self._closed = message
            elif message["method"] != "opened" or not self._opened:
                self._opened = self._opened or message["method"] == "opened"
                self._handler.handle_message(message)


def ended(life: Path) -> Ended | None:
    """How a life ended; None if the job recorded nothing."""
    fields = _read(life / "ended").split()
    return Ended(int(fields[0]), float(fields[1])) if len(fields) == 2 else None


def each_launch(folder: Path) -> list[SlurmJob]:
    """All submissions of a training, newest first."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if LAUNCH.fullmatch(path.name)]
    return [SlurmJob(path) for path in sorted(found, reverse=True)]


def _append(source: Path, log: Path, start: int) -> int:
    """Appends what is new in one file to another; returns the number of bytes."""
    try:
        with source.open("rb") as stream:
            stream.seek(start)
            new = stream.read()
    except FileNotFoundError:
        return 0
    if new:
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            stream.write(new)
    return len(new)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        return ""


def _link(source: str, target: str) -> None:
    """Hard-links a file, or copies it across file systems: models are large."""
    try:
        Path(target).unlink(missing_ok=True)
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
