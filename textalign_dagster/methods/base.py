"""What a method is: the feedback it needs, and how feedback becomes a label and a condition."""

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
"""Placeholder for the condition if each prompt has its own."""


class Method(Settings):
    """Declares one way to train on feedback.

    A new method is one module with a subclass and one line in the registry
    (:mod:`textalign_dagster.methods`).
    """

    objectives: ClassVar[tuple[str, ...]] = ("nll",)
    """The objectives (:mod:`training.objectives`) that train on the method's examples; the first is the default."""

    trains: ClassVar[Literal["policy", "reward model"]] = "policy"
    """What a checkpoint is. Reward models are never sampled from: every iteration samples from the base policy."""

    added: ClassVar[Mapping[str, Any]] = {}
    """Fields that were added later → their neutral value, with which they are left out of artifact keys."""

    name: str
    template: str = Field(
        "{condition} {prompt}",
        description="How a condition is prepended to a prompt, in training and, from iteration 2 on, in sampling.",
    )

    @field_validator("template")
    @classmethod
    def _template(cls, template: str) -> str:
        return validate_template(template)

    @property
    def identity(self) -> dict[str, Any]:
        """The settings that determine the datapool, for artifact keys."""
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

        None: no condition. :data:`VARIED`: each prompt has its own condition
        (:mod:`textalign_dagster.pool.exemplars`).
        """

    @property
    def sweep(self) -> tuple[str, ...]:
        """All conditions of an evaluation, from the best to the worst; empty if it is unconditioned."""
        return () if self.exemplar is None else (self.exemplar, *self.probes)

    @property
    def probes(self) -> tuple[str, ...]:
        """Other conditions to evaluate under, to test whether the policy follows its condition."""
        return ()

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Tokens the method adds to the vocabulary."""
        return ()

    @property
    def banned_tokens(self) -> tuple[str, ...]:
        """Special tokens that a trained policy must not generate."""
        return self.special_tokens

    @property
    def ranking(self) -> QuantileSettings | None:
        """How values become buckets by rank; None: :meth:`label` assigns the buckets."""
        return None

    @property
    def per_segment(self) -> bool:
        """Whether each segment of a document has its own condition, inside the text."""
        return False

    def read_together(self, samples_per_prompt: int) -> int:
        """How many rows must share a micro-batch: those of a pair or of a group."""
        return 1

    def label(self, rows: pl.DataFrame) -> pl.DataFrame:
        """``rows`` with ``label`` (a bucket, or NULL) and ``condition`` (text), both String.

        Not used by methods that label by :attr:`ranking`, whose condition is the label itself.

        Args:
            rows: sample_id, prompt_id, value, label, text, status; one row per sample.
        """
        raise NotImplementedError

    def examples(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The examples to train on, made from the drawn rows; by default one per row.

        Args:
            rows: see :mod:`textalign_dagster.pool.examples`.

        Returns:
            Rows of :data:`textalign_dagster.tables.EXAMPLES`.
        """
        return single(rows)


class Unconditional(Method):
    """A method that trains on all usable samples, without conditions."""

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
    """An unconditional method whose examples are determined by rewards."""

    @property
    def wants(self) -> FeedbackKind:
        return "reward"

    @staticmethod
    def rewarded(rows: pl.DataFrame) -> pl.DataFrame:
        """The rows with a finite reward."""
        return rows.filter(pl.col("value").is_finite())


class Paired(Rewarded):
    """A method whose examples are pairs of samples of the same prompt."""

    added: ClassVar[Mapping[str, Any]] = {"pairs_from": "rewards"}

    pairs_per_prompt: int | None
    margin: float = Field(0.0, ge=0, description="The rewards of a pair must differ by more than this.")
    pairs_from: Literal["rewards", "comparisons"] = Field(
        "rewards",
        description="rewards: pairs of a prompt's samples, by `pairs_per_prompt` and `margin`; comparisons: exactly "
        "the pairs that a judge or a file compared, without ties (the other two settings then have no effect).",
    )

    def read_together(self, samples_per_prompt: int) -> int:
        return 2

    def examples(self, rows: pl.DataFrame) -> pl.DataFrame:
        if self.pairs_from == "comparisons":
            return compared(rows)
        return pairs(rows, per_prompt=self.pairs_per_prompt or rows.height, margin=self.margin)


class Conditional(Method):
    """A method that samples under a condition, chosen by one of the published policies."""

    exemplar_policy: ExemplarPolicy = Field(
        "best",
        description="The condition from iteration 2 on, and in evaluations: none (the bare prompt), "
        "best (the best bucket), static (the text in `ask_for`), varied (one text per prompt, drawn by "
        "seed from the datapool's best bucket). Short form: `exemplar`.",
    )
    ask_for: str | None = Field(
        None,
        validate_default=True,
        description="The condition to sample under; only used with `exemplar: static`.",
    )

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, given: Any) -> Any:
        """``exemplar: varied`` is short for ``exemplar_policy: varied``."""
        if not isinstance(given, dict) or "exemplar" not in given:
            return given
        if "exemplar_policy" in given:
            raise ValueError("`exemplar` and `exemplar_policy` are the same setting; remove one of them")
        return {"exemplar_policy" if key == "exemplar" else key: value for key, value in given.items()}

    @field_validator("ask_for")
    @classmethod
    def _something(cls, ask_for: str | None, others: ValidationInfo) -> str | None:
        if ask_for is None and others.data.get("exemplar_policy") == "static":
            raise PydanticKnownError("missing")
        if ask_for is not None and not ask_for.strip():
            raise ValueError("blank, which is no condition (use `exemplar: none` for that)")
        return ask_for

    @property
    def exemplar(self) -> str | None:
        by_policy = {"none": None, "best": self.best, "static": self.ask_for, "varied": VARIED}
        return by_policy[self.exemplar_policy]

    @property
    @abstractmethod
    def best(self) -> str | None:
        """The condition of the best bucket; None: its samples have different conditions."""


class ClosedConditional(Conditional):
    """A method with one condition per bucket."""

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
                "use `exemplar: best`"
            )
        if self.ask_for is not None and self.ask_for not in self.conditions:
            raise ValueError(
                f"ask_for: {self.ask_for!r} is not a condition of {self.name}; one of: "
                f"{', '.join(self.conditions)}"
            )
        return self
