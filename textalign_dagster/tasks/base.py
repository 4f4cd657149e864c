"""What a task is: where its prompts come from, who judges its samples, what is measured."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import polars as pl

from textalign_dagster.methods import FeedbackKind
from textalign_dagster.settings import Settings


@dataclass(frozen=True)
class Measure:
    """One number reported for a policy: a mean over samples, or a ratio of two sums.

    ``numerator`` and ``denominator`` are columns of :meth:`Task.measure`; the value is
    ``scale * sum(numerator) / sum(denominator)``, or ``scale * mean(numerator)`` without one.
    """

    name: str
    title: str
    numerator: str
    denominator: str | None = None
    scale: float = 1.0
    better: Literal["lower", "higher", "steady"] = "steady"


class Task(Settings):
    """Declares one task. Adding one is one module with a subclass and one line in the registry."""

    name: str

    @abstractmethod
    def prompts(self, split: Literal["train", "evaluation"]) -> pl.DataFrame:
        """The task's prompts: prompt, reference (nullable), source, source_revision (all String).

        The two splits share no prompt.
        """

    @property
    @abstractmethod
    def scorer(self) -> tuple[str, str]:
        """Name and version of what judges the samples; both are stored with every feedback row."""

    @property
    @abstractmethod
    def kinds(self) -> tuple[FeedbackKind, ...]:
        """The kinds of feedback the task's scorer can give."""

    @abstractmethod
    def feedback(self, samples: pl.DataFrame, kind: FeedbackKind) -> pl.DataFrame:
        """Judges samples.

        Args:
            samples: sample_id, prompt, text, finish_reason.
            kind: one of :attr:`kinds`.

        Returns:
            sample_id, aspect, value, text, status, reason; one row a sample.
        """

    @abstractmethod
    def measure(self, samples: pl.DataFrame) -> pl.DataFrame:
        """Per-sample numbers of an evaluation.

        Args:
            samples: sample_id, prompt, text, finish_reason.

        Returns:
            sample_id and one Float64 column for each column that :attr:`measures` name.
        """

    @property
    @abstractmethod
    def measures(self) -> tuple[Measure, ...]:
        """What is reported; the first is the one the task exists to improve."""

    def builtin_policy(self, name: str) -> str | None:
        """Folder of a policy that ships with the task, if it has one of that name."""
        return None

    @property
    def builtin_policies(self) -> tuple[str, ...]:
        """Names :meth:`builtin_policy` knows."""
        return ()
