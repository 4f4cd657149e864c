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
    ``per_prompt`` "max" the mean goes over the prompts' greatest values ("any of 25 samples is
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
    """Declares one task. Adding one is one module with a subclass and one line in the registry."""

    name: str

    judged_by_others: ClassVar[bool] = False
    """Whether the task's goal is the value of a scorer or judge: then that is reported first."""

    @abstractmethod
    def prompts(self, split: Literal["train", "evaluation"]) -> pl.DataFrame:
        """The task's prompts: prompt, reference (nullable), source, source_revision (all String).

        The two splits share no prompt.
        """

    def for_policy(self, folder: Callable[[], Path]) -> Task:
        """The task for a base policy, which most tasks do not depend on.

        Args:
            folder: gives the policy's folder; a hub model is fetched when it is called.
        """
        return self

    def cleaned(self, prompt: str) -> str:
        """A prompt of a file (`prompts.path`, `evaluation.path`) as the task reads it.

        Raises:
            ValueError: the task cannot use it; the message says why.
        """
        return prompt

    @property
    def notes(self) -> tuple[str, ...]:
        """What of the task's own prompts was left out and why, a line each."""
        return ()

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that prompts, feedback and measures follow from, as JSON, for the keys of artifacts.

        Not where prompts are read from: which prompts they are is known by their content.
        """
        return self.model_dump(mode="json")

    @property
    def scorer(self) -> tuple[str, str]:
        """Name and version of the task's own judgement (:meth:`feedback`, :meth:`measure`)."""
        return self.name, "1"

    @property
    def default_scorer(self) -> Scorer | None:
        """What scores the samples where the experiment names no scorer; None: the task itself, if at all."""
        return None

    @property
    def kinds(self) -> tuple[FeedbackKind, ...]:
        """The kinds of feedback the task itself gives; none: the experiment names a scorer or a judge."""
        return ()

    def feedback(self, samples: pl.DataFrame, kind: FeedbackKind) -> pl.DataFrame:
        """Judges samples.

        Args:
            samples: sample_id, prompt, reference, text, finish_reason.
            kind: one of :attr:`kinds`.

        Returns:
            sample_id, aspect, value, label, text, status, reason; one row a sample.
        """
        raise NotImplementedError(f"task {self.name} gives no feedback of its own")

    def spans(self, samples: pl.DataFrame) -> pl.DataFrame:
        """Where in the texts the feedback of kind ``spans`` points.

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
            samples: sample_id, prompt_id, prompt, reference, role, text, finish_reason, n_tokens, and what
                the evaluation's scorer and judge gave: score (Float64, in the scorer's own direction)
                and label (String), NULL where there is none of them or it could not tell.

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
