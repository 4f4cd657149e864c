"""The interface of objectives: settings, needs, and a loss over per-token log-probabilities.

An objective is a pydantic section (``training.objective`` of an experiment) with one pure method,
:meth:`Objective.loss`. The trainer knows objectives only through this class: it reads :attr:`Objective.needs`
before training, provides each need once, and minimises ``loss(...).total`` summed over all micro-batches and
processes, divided by the step's :meth:`Objective.mass`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from textalign_dagster.settings import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from training.objectives.tokens import Tokens

Need = Literal[
    "reference",
    "reference log-probs",
    "second context",
    "mismatched",
    "token scores",
    "groups",
    "rewards",
    "sampled log-probs",
    "score head",
    "value head",
]
"""What an objective can request in addition to the policy's log-probabilities:

- ``reference``: the reference's log-probabilities over the full vocabulary, in every step;
- ``reference log-probs``: those of the targets only, computed once per (reference, sequence) and cached in a
  table that all methods share;
- ``second context``: for examples with a ``second_prompt``, the policy's log-probabilities of the targets
  under that prompt too, from the same forward pass;
- ``mismatched``: the policy's log-probabilities of the targets under the ``second_prompt``, here another
  example's prompt, without gradients, before each step (:meth:`Objective.before_step`); with
  ``reference log-probs`` the reference's too;
- ``token scores``: the scores of the example's ``spans``, per token;
- ``groups``: all sequences of a ``group_id`` (e.g. a pair) in the same micro-batch;
- ``rewards``, ``sampled log-probs``: the example's ``reward`` and ``sampled_logprob``;
- ``score head``: one score per sequence instead of logits over the vocabulary. The model becomes a sequence
  classifier with one output, a reward model;
- ``value head``: one value per target, from a head on the hidden state that predicts it."""

ROLES = ("only", "chosen", "rejected", "member")
"""The roles of an example; :attr:`Sequences.roles` holds indices into this tuple."""
ONLY, CHOSEN, REJECTED, MEMBER = range(4)


class Sequences(NamedTuple):
    """The sequences (examples) of a micro-batch."""

    weights: Tensor  # [B], at least 0; 0 leaves the sequence out
    counted: Tensor  # [B] number of labelled tokens
    roles: Tensor  # [B] index into ROLES
    groups: Tensor  # [B] sequences of one group have the same number; -1: no group
    rewards: Tensor  # [B], NaN where there is none
    sampled_log_probs: Tensor  # [B] log-probability of the text when it was sampled, NaN where unknown


class Loss(NamedTuple):
    """Sums over a micro-batch; divided by the step's mass they are means."""

    total: Tensor  # scalar, differentiable: what is minimised
    parts: Mapping[str, Tensor] = {}  # scalars, detached: reported, or used to adapt coefficients


class Objective(Settings):
    """A training loss. A subclass is one module and one line in the registry (:mod:`training.objectives`)."""

    name: str

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]:
        """What the trainer has to provide."""

    @property
    def reference_policy(self) -> Literal["base", "parent"] | None:
        """Which policy is the reference; None: the objective has none."""
        return None

    @property
    def reference_sees_condition(self) -> bool:
        """Whether the reference also reads the condition, not just the bare prompt."""
        return True

    @property
    def detaches_value(self) -> bool:
        """Whether the value loss trains only the value head."""
        return False

    @abstractmethod
    def mass(self, sequences: Sequences) -> Tensor:
        """The weight of a micro-batch, a scalar: the step's loss is divided by the sum of all masses.

        It must not depend on the model: it is computed before the first forward pass, so that sequences
        count the same in whichever micro-batch or process they are.
        """

    def before_step(self, mismatched: Tokens, sequences: Sequences) -> Mapping[str, Tensor]:
        """Sums over a micro-batch, computed without gradients before the step.

        :meth:`loss` gets them among its coefficients, under the same names, as means over the step: summed
        over all its micro-batches and processes and divided by its mass.

        Args:
            mismatched: each sequence's targets under another sequence's prompt.
        """
        return {}

    @abstractmethod
    def loss(self, tokens: Tokens, sequences: Sequences, coefficients: Mapping[str, float]) -> Loss:
        """The loss of a micro-batch, as sums.

        Args:
            coefficients: those from :meth:`start` and :meth:`adapt`, and the means of :meth:`before_step`.
        """

    def start(self) -> dict[str, float]:
        """Initial values of the coefficients that change during training, by setting name."""
        return {}

    def adapt(
        self, coefficients: Mapping[str, float], sums: Mapping[str, float], step: Step
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Called after a step; returns the next coefficients, and the step's figures to report.

        Args:
            sums: ``Loss.parts`` summed over the step's micro-batches and processes.
        """
        means = {name: value / step.mass for name, value in sums.items()} if step.mass > 0 else {}
        return dict(coefficients), means

    def identity(self) -> dict[str, Any]:
        """The settings that determine the training, for artifact keys."""
        return self.model_dump(mode="json")


class Step(NamedTuple):
    """Totals of an optimizer step, over all micro-batches and processes."""

    mass: float
    weight: float  # sum of the sequences' weights
    sequences: float  # number of sequences with a weight above 0
