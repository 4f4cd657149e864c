"""What an objective is: its settings, what it needs, and a loss over per-token log-probabilities.

An objective is a pydantic section (``training.objective`` of an experiment) with one pure method,
:meth:`Objective.loss`. The trainer knows objectives through this class only: it reads :attr:`Objective.needs`
before the training, meets each need once, and minimises ``loss(...).total`` of all micro-batches and
processes over the step's :meth:`Objective.mass`.
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
"""What an objective can ask for beside the policy's log-probabilities:

- ``reference``: the reference's log-probabilities over the full vocabulary, in every step;
- ``reference log-probs``: those of the targets alone. They are computed once for each (reference, sequence)
  and kept in a table that all methods share;
- ``second context``: the targets of examples that have a ``second_prompt``, read under it too, by the
  policy and in the same forward pass;
- ``mismatched``: the targets under the ``second_prompt``, another example's, by the policy and without
  gradients, before each step (:meth:`Objective.before_step`); with ``reference log-probs`` under the
  reference too;
- ``token scores``: the scores of the example's ``spans``, by token;
- ``groups``: all sequences of a ``group_id`` (a pair, say) in the same micro-batch;
- ``rewards``, ``sampled log-probs``: the example's ``reward`` and ``sampled_logprob``;
- ``score head``: one number for a whole sequence in place of the vocabulary. The model becomes a sequence
  classifier with one output, a reward model;
- ``value head``: a number for each target, from a head on the hidden state that predicts it."""

ROLES = ("only", "chosen", "rejected", "member")
"""The roles of an example; :attr:`Sequences.roles` holds their places in this list."""
ONLY, CHOSEN, REJECTED, MEMBER = range(4)


class Sequences(NamedTuple):
    """The sequences (examples) of a micro-batch."""

    weights: Tensor  # [B], at least 0; 0 leaves the sequence out
    counted: Tensor  # [B] number of labelled tokens
    roles: Tensor  # [B] index into ROLES
    groups: Tensor  # [B] sequences of one group have the same number; -1: none
    rewards: Tensor  # [B], NaN where there is none
    sampled_log_probs: Tensor  # [B] log-probability of the text when it was sampled, NaN where unknown


class Loss(NamedTuple):
    """Sums over a micro-batch; divided by the step's mass they are means."""

    total: Tensor  # scalar, differentiable: what is minimised
    parts: Mapping[str, Tensor] = {}  # scalars, detached: what is reported, or adapts coefficients


class Objective(Settings):
    """One way to score a batch. A subclass is one module and one line in the registry
    (:mod:`training.objectives`)."""

    name: str

    @property
    @abstractmethod
    def needs(self) -> frozenset[Need]:
        """What the trainer has to provide."""

    @property
    def reference_policy(self) -> Literal["base", "parent"] | None:
        """Which policy is the reference; None: the objective reads none."""
        return None

    @property
    def reference_sees_condition(self) -> bool:
        """Whether the reference reads the condition too, or the bare prompt."""
        return True

    @property
    def detaches_value(self) -> bool:
        """Whether the loss of the value trains the value head alone."""
        return False

    @abstractmethod
    def mass(self, sequences: Sequences) -> Tensor:
        """The weight of a micro-batch, a scalar: the step's loss is divided by the sum of all masses.

        It must not depend on the model: it is known before the first forward pass, so that sequences
        count the same whichever micro-batch or process they are in.
        """

    def before_step(self, mismatched: Tokens, sequences: Sequences) -> Mapping[str, Tensor]:
        """Sums over a micro-batch, computed without gradients before the step.

        :meth:`loss` reads them among its coefficients, under the same names: as means over the step,
        the sums over all its micro-batches and processes divided by its mass.

        Args:
            mismatched: each sequence's targets under the prompt of another one.
        """
        return {}

    @abstractmethod
    def loss(self, tokens: Tokens, sequences: Sequences, coefficients: Mapping[str, float]) -> Loss:
        """The loss of a micro-batch, as sums.

        Args:
            coefficients: as :meth:`start` and :meth:`adapt` gave them, and the means of :meth:`before_step`.
        """

    def start(self) -> dict[str, float]:
        """Coefficients that change during training, by the name of their setting."""
        return {}

    def adapt(
        self, coefficients: Mapping[str, float], sums: Mapping[str, float], step: Step
    ) -> tuple[dict[str, float], dict[str, float]]:
        """After a step: the next coefficients, and figures of the step to report.

        Args:
            sums: ``Loss.parts`` summed over the step, all micro-batches and processes.
        """
        means = {name: value / step.mass for name, value in sums.items()} if step.mass > 0 else {}
        return dict(coefficients), means

    def identity(self) -> dict[str, Any]:
        """The settings that the training follows from, for the keys of artifacts."""
        return self.model_dump(mode="json")


class Step(NamedTuple):
    """What an optimizer step was computed on, over all micro-batches and processes."""

    mass: float
    weight: float  # sum of the sequences' weights
    sequences: float  # how many have a weight above 0
