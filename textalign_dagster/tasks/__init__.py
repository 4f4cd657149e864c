"""The tasks: one module each, one line each here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from textalign_dagster.tasks.base import Measure, Task
from textalign_dagster.tasks.dialogue import Dialogue
from textalign_dagster.tasks.instructions import Instructions
from textalign_dagster.tasks.pep8 import Pep8
from textalign_dagster.tasks.pii import PII
from textalign_dagster.tasks.summarization import Summarization
from textalign_dagster.tasks.toxicity import Toxicity

AnyTask = Annotated[
    Dialogue | Instructions | PII | Pep8 | Summarization | Toxicity, Field(discriminator="name")
]

__all__ = [
    "PII",
    "AnyTask",
    "Dialogue",
    "Instructions",
    "Measure",
    "Pep8",
    "Summarization",
    "Task",
    "Toxicity",
]
