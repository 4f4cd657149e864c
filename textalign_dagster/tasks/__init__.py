"""The tasks: one module each, one line each here."""

from __future__ import annotations

from textalign_dagster.tasks.base import Measure, Task
from textalign_dagster.tasks.pep8 import Pep8

AnyTask = Pep8  # becomes a union discriminated by ``name`` with the second task

__all__ = ["AnyTask", "Measure", "Pep8", "Task"]
