"""What a method is: the feedback it wants, how feedback becomes a label and a condition."""

from __future__ import annotations

from abc import abstractmethod
from typing import Literal

import polars as pl
from pydantic import Field, field_validator

from textalign_dagster.conditioning import validate_template
from textalign_dagster.quantiles import QuantileSettings
from textalign_dagster.settings import Settings

FeedbackKind = Literal["reward", "text", "category"]


class Method(Settings):
    """Declares one way from feedback to conditional training.

    Adding a method is one module with a subclass, and one line in the registry
    (:mod:`textalign_dagster.methods`).
    """

    name: str
    template: str = Field(
        "{condition} {prompt}",
        description="How a condition stands before a prompt, in training and from iteration 2 on in sampling.",
    )

    @field_validator("template")
    @classmethod
    def _template(cls, template: str) -> str:
        validate_template(template)
        return template

    @property
    @abstractmethod
    def wants(self) -> FeedbackKind | None:
        """The kind of feedback rows the method reads; None: it uses no feedback."""

    @property
    @abstractmethod
    def buckets(self) -> tuple[str, ...]:
        """The labels a sample can get, best first; the pool is balanced over them."""

    @property
    @abstractmethod
    def exemplar(self) -> str | None:
        """The condition the policy is asked for from iteration 2 on, and evaluated under."""

    @property
    def probes(self) -> tuple[str, ...]:
        """Other conditions to evaluate: does the policy do what it is asked for?"""
        return ()

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Tokens the method adds to the vocabulary."""
        return ()

    @property
    def ranking(self) -> QuantileSettings | None:
        """How values become buckets by rank; None: :meth:`label` says which bucket a row is in."""
        return None

    def label(self, rows: pl.DataFrame) -> pl.DataFrame:
        """``rows`` with ``label`` (a bucket, or NULL) and ``condition`` (text), both String.

        Not used by methods that label by :attr:`ranking`, whose condition is the label itself.

        Args:
            rows: sample_id, prompt_id, value, label, text, status; one row a sample.
        """
        raise NotImplementedError
