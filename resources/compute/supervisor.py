"""Runs a command so that neither it nor anything it starts outlives its launcher.

    python -I -S supervisor.py LIFELINE_FD GRACE_SECONDS COMMAND…      (started by resources/compute/processes.py)

Three things can go wrong with a training's processes: the run is cancelled, the run is SIGKILLed,
or a launcher dies and leaves its ranks behind. In all three this process ends the whole tree: SIGTERM,
a grace period, then SIGKILL until no process is left. It detects its own launcher's death through the
lifeline, a pipe whose write end only the launcher holds.

The tree is more than the process group: torchrun gives each rank its own session. It is all processes
that have this one as an ancestor (orphans are reparented to it), are in its group, or carry its
mark in their environment (which is inherited, and also finds them when this process itself was
killed). It needs only the standard library, so it starts in 20 ms.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "TEXTALIGN_SUPERVISED_BY"
POLL = 0.02  # seconds between checks of processes that were signalled to end
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
PROC = Path("/proc")


def main() -> int:
    lifeline, grace, command = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3:]
    mark = os.environ[MARK]
    os.set_inheritable(lifeline, False)
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    wakeup, wakeup_writer = os.pipe()
    os.set_blocking(wakeup, False)
    os.set_blocking(wakeup_writer, False)
    signal.set_wakeup_fd(wakeup_writer, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
        signal.signal(number, lambda *_: None)  # the number arrives through the pipe
    # The command's leader dies with this process, however this process dies.
    child = subprocess.Popen(command, preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGKILL))
    code = None
    while code is None:
        ready, _, _ = select.select([lifeline, wakeup], [], [])
        signals = set(os.read(wakeup, 4096)) if wakeup in ready else set()
        code = _reap(child.pid)
        if code is None and (lifeline in ready or signals - {signal.SIGCHLD}):
            code = 128 + signal.SIGTERM
    child.returncode = code  # reaped here, not by Popen
    end(os.getpid(), mark, grace)
    return code


def end(leader: int, mark: str, grace: float) -> None:
    """Ends all processes that belong to ``leader`` (but not the leader itself); returns when they are gone."""
    late = time.monotonic() + grace
    signalled: set[int] = set()
    while alive := set(members(leader, mark)):
        now_late = time.monotonic() >= late
        for pid in alive if now_late else alive - signalled:
            _kill(pid, signal.SIGKILL if now_late else signal.SIGTERM)
        signalled |= alive
        time.sleep(POLL)
        _reap(None)


def members(leader: int, mark: str) -> Iterator[int]:
    """Living descendants of ``leader``, or processes in its group or with its mark; never this one or the leader."""
    table = list(_processes())
    parents = {pid: parent for pid, parent, _ in table}
    marked = f"{MARK}={mark}".encode()
    for pid, _, group in table:
        if pid in (leader, os.getpid()):
            continue
        if group == leader or _below(pid, leader, parents) or _carries(pid, marked):
            yield pid


def _below(pid: int, leader: int, parents: dict[int, int]) -> bool:
    seen: set[int] = set()
    while pid in parents and pid not in seen:
        seen.add(pid)
        pid = parents[pid]
        if pid == leader:
            return True
    return False


def _carries(pid: int, marked: bytes) -> bool:
    try:
        return marked in (PROC / str(pid) / "environ").read_bytes().split(b"\0")
    except OSError:  # gone meanwhile, or another user's
        return False


def _processes() -> Iterator[tuple[int, int, int]]:
    """(pid, parent, group) of every living process; zombies count as dead."""
    if not (PROC / "self/stat").exists():
        listing = subprocess.run(
            ["ps", "-axo", "pid=,ppid=,pgid=,stat="], capture_output=True, text=True, check=True
        )
        for line in listing.stdout.splitlines():
            pid, parent, group, state = line.split()[:4]
            if not state.startswith("Z"):
                yield int(pid), int(parent), int(group)
        return
    for entry in PROC.iterdir():
        if not entry.name.isdigit():
            continue
        try:
            # The name in parentheses may itself contain spaces and parentheses.
            state, parent, group = (entry / "stat").read_text().rpartition(")")[2].split()[:3]
        except OSError:  # gone meanwhile
            continue
        if state not in "ZX":
            yield int(entry.name), int(parent), int(group)


def _reap(child: int | None) -> int | None:
    """Reaps processes that have ended; the exit code of ``child`` if it is among them."""
    code = None
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return code
        if pid == 0:
            return code
        if pid == child:
            exit_code = os.waitstatus_to_exitcode(status)
            code = exit_code if exit_code >= 0 else 128 - exit_code


def _kill(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # already gone
        os.kill(pid, number)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(main())
