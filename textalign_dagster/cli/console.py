"""What the terminal shows while stages run: one line each, with the time left."""

from __future__ import annotations

import threading
import time
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from textalign_dagster.progress import Finished, Step


class ProgressLines:
    """A live bar for the running stage, on a terminal; a plain line for each finished stage.

    If the output is not a terminal, only the lines for finished stages are printed.
    """

    def __init__(self, console: Console) -> None:
        self.console = console
        self._lock = threading.Lock()
        self._task: tuple[tuple[str, str], TaskID] | None = None
        self._since = time.monotonic()
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(compact=True),
            TextColumn("left  {task.fields[note]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def show(self, event: Step | Finished) -> None:
        """Shows a step or a finished stage."""
        with self._lock:
            if isinstance(event, Step):
                self._step(event)
            else:
                self._finished(event)

    def _step(self, step: Step) -> None:
        at = (step.cell, step.stage)
        if self._task is None or self._task[0] != at:
            self._clear()
            name = f"{step.cell}  {step.stage}"
            self._task = (at, self._bars.add_task(name, total=step.total, note=""))
        self._bars.update(self._task[1], completed=step.done, total=step.total, note=step.note)

    def _finished(self, stage: Finished) -> None:
        self._clear()
        now = time.monotonic()
        took = "reused" if stage.reused else f"{now - self._since:.1f} s"
        self._since = now
        self.console.print(
            f"{stage.cell:<22} {stage.stage:<13} {took:>8}   {stage.headline}",
            highlight=False,
            markup=False,
        )

    def _clear(self) -> None:
        if self._task is not None:
            self._bars.remove_task(self._task[1])
            self._task = None
