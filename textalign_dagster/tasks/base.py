"""What a task is: where its prompts come from, who judges its samples, what is measured."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import polars as pl

from textalign_dagster.methods import FeedbackKind
from textalign_dagster.scorers.base import Scorer
from textalign_dagster.settings import Settings


@dataclass(frozen=True)
class Measure:
    """One number reported for a policy: a mean over samples or over prompts, or a ratio of two sums.

    ``numerator`` and ``denominator`` are columns of :meth:`Task.measure`; the value is
    ``scale * sum(numerator) / sum(denominator)``, or ``scale * mean(numerator)`` without one. With
    ``per_prompt`` "max" the mean is over the prompts' greatest values ("any of 25 samples is
    toxic", "the most toxic of 25"). Samples whose numerator is NULL do not count.
    """

    name: str
    title: str
    numerator: str
    denominator: str | None = None
    scale: float = 1.0
    better: Literal["lower", "higher", "steady"] = "steady"
    per_prompt: Literal["mean", "max"] = "mean"


class Task(Settings):
    """Declares one task. A new task is one module with a subclass and one line in the registry."""

    name: str

    judged_by_others: ClassVar[bool] = False
    """Whether the task's goal is the value of a scorer or judge, which is then reported first."""

    @abstractmethod
    def prompts(self, split: Literal["train", "evaluation"]) -> pl.DataFrame:
        """The task's prompts: prompt, reference (nullable), source, source_revision (all String).

        The two splits share no prompt.
        """

    def for_policy(self, folder: Callable[[], Path]) -> Task:
        """The task for a base policy; most tasks do not depend on it.

        Args:
            folder: returns the policy's folder; calling it fetches a hub model.
        """
        return self

    def cleaned(self, prompt: str) -> str:
        """A prompt from a file (`prompts.path`, `evaluation.path`) as the task uses it.

        Raises:
            ValueError: the task cannot use it; the message says why.
        """
        return prompt

    @property
    def notes(self) -> tuple[str, ...]:
        """What was left out of the task's own prompts and why, one line each."""
        return ()

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that determine prompts, feedback and measures, as JSON, for artifact keys.

        Without the source of the prompts, which are identified by their content.
        """
        return self.model_dump(mode="json")

    @property
    def scorer(self) -> tuple[str, str]:
        """Name and version of the task's own scoring (:meth:`feedback`, :meth:`measure`)."""
        return self.name, "1"

    @property
    def default_scorer(self) -> Scorer | None:
        """The scorer of samples if the experiment names none; None: the task itself, if at all."""
        return None

    @property
    def kinds(self) -> tuple[FeedbackKind, ...]:
        """The kinds of feedback the task itself gives; empty: the experiment has to name a scorer or a judge."""
        return ()

    def feedback(self, samples: pl.DataFrame, kind: FeedbackKind) -> pl.DataFrame:
        """Judges samples.

        Args:
            samples: sample_id, prompt, reference, text, finish_reason.
            kind: one of :attr:`kinds`.

        Returns:
            sample_id, aspect, value, label, text, status, reason; one row per sample.
        """
        raise NotImplementedError(f"task {self.name} has no feedback of its own")

    def spans(self, samples: pl.DataFrame) -> pl.DataFrame:
        """The spans of the texts that feedback of kind ``spans`` marks.

        Args:
            samples: as for :meth:`feedback`.

        Returns:
            Rows of :data:`textalign_dagster.tables.FEEDBACK_SPANS`; a sample may have none.
        """
        raise NotImplementedError(f"task {self.name} marks no spans")

    @abstractmethod
    def measure(self, samples: pl.DataFrame) -> pl.DataFrame:
        """Per-sample numbers of an evaluation.

        Args:
            samples: sample_id, prompt_id, prompt, reference, role, text, finish_reason, n_tokens, and the
                results of the evaluation's scorer and judge: score (Float64, in the scorer's own direction)
                and label (String), NULL where there is no scorer or judge, or no result.

        Returns:
            sample_id and one Float64 column for each column named in :attr:`measures`.
        """

    @property
    @abstractmethod
    def measures(self) -> tuple[Measure, ...]:
        """The reported measures; the first is the one the task exists to improve."""

    def builtin_policy(self, name: str) -> str | None:
        """Folder of a policy that ships with the task, if it has one of that name."""
        return None

    @property
    def builtin_policies(self) -> tuple[str, ...]:
        """Names that :meth:`builtin_policy` knows."""
        return ()
