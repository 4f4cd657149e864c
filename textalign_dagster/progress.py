"""Progress of long-running stages: they report it, their caller shows it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True)
class Step:
    """``done`` of ``total`` units of a stage's work, and a short note (loss, tokens/s)."""

    cell: str
    stage: str
    done: int
    total: int
    note: str = ""


@dataclass(frozen=True)
class Finished:
    """A stage's output is published; ``reused`` if it already existed."""

    cell: str
    stage: str
    headline: str
    reused: bool


Sink = Callable[[Step | Finished], None]
_sink: Sink | None = None  # a module global, not a context variable: reader threads report too


@contextmanager
def shown_by(sink: Sink) -> Iterator[None]:
    """Sends everything reported inside the block, from any thread, to ``sink``."""
    global _sink
    before, _sink = _sink, sink
    try:
        yield
    finally:
        _sink = before


def somebody_waits() -> bool:
    """Whether a person is watching this process; if so, a stage waits even for replies that take a day."""
    return _sink is not None


def announce(event: Step | Finished) -> None:
    """Passes an event to the sink, if there is one."""
    if _sink is not None:
        _sink(event)


def reporter(cell: str, stage: str, log: Callable[[str], None], every: float = 5.0) -> Callable[..., None]:
    """A callback ``(done, total, note="")`` for a stage's work.

    Without a sink, progress is logged every ``every`` seconds, with the time left.
    """
    started = last = time.monotonic()
    lock = threading.Lock()

    def report(done: int, total: int, note: str = "") -> None:
        nonlocal last
        announce(Step(cell, stage, done, total, note))
        now = time.monotonic()
        with lock:
            if _sink is not None or now - last < every or not 0 < done < total:
                return
            last = now
        left = (now - started) / done * (total - done)
        log(f"{stage}: {done:,} of {total:,}, about {left:.0f} s left{f', {note}' if note else ''}")

    return report
