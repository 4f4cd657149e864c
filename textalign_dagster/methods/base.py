"""What a method is: the feedback it needs, how feedback becomes a label and a condition."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

import polars as pl
from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticKnownError

from textalign_dagster.pool.conditioning import validate_template
from textalign_dagster.pool.examples import compared, pairs, single
from textalign_dagster.pool.quantiles import QuantileSettings
from textalign_dagster.settings import Settings

FeedbackKind = Literal["reward", "text", "category", "judgment", "spans"]
ExemplarPolicy = Literal["none", "best", "static", "varied"]

VARIED = "(varied)"
"""Stands for the condition where each prompt has one of its own."""


class Method(Settings):
    """Declares one way from feedback to conditional training.

    Adding a method is one module with a subclass, and one line in the registry
    (:mod:`textalign_dagster.methods`).
    """

    objectives: ClassVar[tuple[str, ...]] = ("nll",)
    """The objectives (:mod:`training.objectives`) that train on the method's examples; the first by default."""

    trains: ClassVar[Literal["policy", "reward model"]] = "policy"
    """What a checkpoint is. A reward model is never sampled: every iteration samples from the base policy."""

    added: ClassVar[Mapping[str, Any]] = {}
    """Fields that were added later → the value by which they change nothing, and are then left out of the keys of artifacts."""

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
    def identity(self) -> dict[str, Any]:
        """The settings that the datapool follows from, for the keys of artifacts."""
        known = self.model_dump(mode="json")
        return {k: v for k, v in known.items() if k not in self.added or v != self.added[k]}

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
        """The condition the policy is sampled under from iteration 2 on, and evaluated under.

        None: no condition. :data:`VARIED`: each prompt has a condition of its own
        (:mod:`textalign_dagster.pool.exemplars`).
        """

    @property
    def sweep(self) -> tuple[str, ...]:
        """All that an evaluation asks for, from the best to the worst; empty where it asks for nothing."""
        return () if self.exemplar is None else (self.exemplar, *self.probes)

    @property
    def probes(self) -> tuple[str, ...]:
        """Other conditions to evaluate: does the policy follow its condition?"""
        return ()

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Tokens the method adds to the vocabulary."""
        return ()

    @property
    def banned_tokens(self) -> tuple[str, ...]:
        """Those that a trained policy must not write."""
        return self.special_tokens

    @property
    def ranking(self) -> QuantileSettings | None:
        """How values become buckets by rank; None: :meth:`label` assigns the buckets."""
        return None

    @property
    def per_segment(self) -> bool:
        """Whether the segments of a document have conditions of their own, inside the text."""
        return False

    def read_together(self, samples_per_prompt: int) -> int:
        """How many rows the training reads in one micro-batch, at least: a pair, a group."""
        return 1

    def label(self, rows: pl.DataFrame) -> pl.DataFrame:
        """``rows`` with ``label`` (a bucket, or NULL) and ``condition`` (text), both String.

        Not used by methods that label by :attr:`ranking`, whose condition is the label itself.

        Args:
            rows: sample_id, prompt_id, value, label, text, status; one row a sample.
        """
        raise NotImplementedError

    def examples(self, rows: pl.DataFrame) -> pl.DataFrame:
        """What is trained on: the drawn rows as examples, one a row by default.

        Args:
            rows: see :mod:`textalign_dagster.pool.examples`.

        Returns:
            Rows of :data:`textalign_dagster.tables.EXAMPLES`.
        """
        return single(rows)


class Unconditional(Method):
    """A method that trains on all usable samples and asks the policy for nothing."""

    @property
    def buckets(self) -> tuple[str, ...]:
        return ("sample",)

    @property
    def exemplar(self) -> None:
        return None

    def label(self, rows: pl.DataFrame) -> pl.DataFrame:
        usable = pl.col("status") == "ok"
        return rows.with_columns(
            label=pl.when(usable).then(pl.lit(self.buckets[0])), condition=pl.lit(None, dtype=pl.String)
        )


class Rewarded(Unconditional):
    """One whose examples follow from rewards."""

    @property
    def wants(self) -> FeedbackKind:
        return "reward"

    @staticmethod
    def rewarded(rows: pl.DataFrame) -> pl.DataFrame:
        """The rows that have a reward."""
        return rows.filter(pl.col("value").is_finite())


class Paired(Rewarded):
    """One whose examples are pairs of a prompt's samples."""

    added: ClassVar[Mapping[str, Any]] = {"pairs_from": "rewards"}

    pairs_per_prompt: int | None
    margin: float = Field(0.0, ge=0, description="A pair needs a larger difference of rewards than this.")
    pairs_from: Literal["rewards", "comparisons"] = Field(
        "rewards",
        description="rewards: of a prompt's samples, by `pairs_per_prompt` and `margin`; comparisons: exactly those "
        "pairs that a judge or a file compared, ties left out (both settings have no effect then).",
    )

    def read_together(self, samples_per_prompt: int) -> int:
        return 2

    def examples(self, rows: pl.DataFrame) -> pl.DataFrame:
        if self.pairs_from == "comparisons":
            return compared(rows)
        return pairs(rows, per_prompt=self.pairs_per_prompt or rows.height, margin=self.margin)


class Conditional(Method):
    """A method that asks for something, by one of the published policies."""

    exemplar_policy: ExemplarPolicy = Field(
        "best",
        description="The condition from iteration 2 on, and in evaluations: none (the bare prompt), "
        "best (the best bucket), static (the text in `ask_for`), varied (for each prompt a text of the "
        "datapool's best bucket, drawn by seed). `exemplar` for short.",
    )
    ask_for: str | None = Field(
        None, validate_default=True, description="The condition to ask for; read by `exemplar: static` alone."
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:
        """``exemplar: varied`` is short for ``exemplar_policy: varied``."""
        if not isinstance(given, dict) or "exemplar" not in given:
            return given
        if "exemplar_policy" in given:
            raise ValueError("`exemplar` and `exemplar_policy` are one setting; remove one of them")
        return {"exemplar_policy" if key == "exemplar" else key: value for key, value in given.items()}

    @field_validator("ask_for")
    @classmethod
    def _something(cls, ask_for: str | None, others: ValidationInfo) -> str | None:
        if ask_for is None and others.data.get("exemplar_policy") == "static":
            raise PydanticKnownError("missing")
        if ask_for is not None and not ask_for.strip():
            raise ValueError("blank; it would ask for nothing (`exemplar: none` does so)")
        return ask_for

    @property
    def exemplar(self) -> str | None:
        by_policy = {"none": None, "best": self.best, "static": self.ask_for, "varied": VARIED}
        return by_policy[self.exemplar_policy]

    @property
    @abstractmethod
    def best(self) -> str | None:
        """The condition of the best bucket; None: its samples have different ones."""


class ClosedConditional(Conditional):
    """A method with one condition a bucket."""

    @property
    def conditions(self) -> tuple[str, ...]:
        """The condition of each bucket, best first."""
        return self.buckets

    @property
    def best(self) -> str:
        return self.conditions[0]

    @property
    def probes(self) -> tuple[str, ...]:
        return tuple(condition for condition in self.conditions if condition != self.exemplar)

    @property
    def sweep(self) -> tuple[str, ...]:
        return () if self.exemplar is None else self.conditions

    @model_validator(mode="after")
    def _exemplar_is_a_condition(self) -> Self:
        if self.exemplar_policy == "varied":
            raise ValueError(
                f"exemplar: varied: every sample in the best bucket of {self.name} has the same condition; "
                "say `exemplar: best`"
            )
        if self.ask_for is not None and self.ask_for not in self.conditions:
            raise ValueError(
                f"ask_for: {self.ask_for!r} is not a condition that {self.name} trains under; one of: "
                f"{', '.join(self.conditions)}"
            )
        return self
