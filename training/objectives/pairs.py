"""Shared parts of objectives over preference pairs: which sequences form a pair, their weights and log-ratios."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from training.objectives.base import CHOSEN, REJECTED, Loss, Need, Objective, Sequences
from training.objectives.tokens import Tokens, per_sequence, target_log_probs

if TYPE_CHECKING:
    from torch import Tensor


class PairObjective(Objective):
    """A mean over pairs, each with its weight; both sequences of a pair share a micro-batch."""

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"groups"})

    def mass(self, sequences: Sequences) -> Tensor:
        """The sum of the pairs' weights; both sequences of a pair have the pair's weight."""
        return sequences.weights[sequences.roles == CHOSEN].sum()


class ReferencePairObjective(PairObjective):
    """A pair objective that compares the policy with a reference."""

    reference: Literal["base", "parent"] = Field(
        "base", description="The reference: the base policy, or the policy this iteration started from."
    )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference log-probs", "groups"})

    @property
    def reference_policy(self) -> Literal["base", "parent"]:
        return self.reference


def paired(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """The indices of the chosen and of the rejected sequences, [pairs] each, in the same order."""
    import torch

    def places(role: int) -> Tensor:
        indices = (sequences.roles == role).nonzero()[:, 0]
        return indices[torch.argsort(sequences.groups[indices])]

    return places(CHOSEN), places(REJECTED)


def log_ratios(tokens: Tokens, sequences: Sequences) -> Tensor:
    """log π(y|x) − log π_ref(y|x) of every sequence, summed over its tokens, [B]."""
    assert tokens.reference_log_probs is not None, "required by the objective"
    ratios = target_log_probs(tokens.log_probs, tokens.targets) - tokens.reference_log_probs
    return per_sequence(ratios, tokens.rows, len(sequences.weights))


def pair_loss(losses: Tensor, margins: Tensor, weights: Tensor) -> Loss:
    """The weighted sum of the pairs' losses, with the mean margin and how often it is positive.

    Args:
        losses, margins, weights: [pairs].
    """
    weights = weights.to(losses.dtype)
    parts: Mapping[str, Tensor] = {"margin": margins, "accuracy": (margins > 0).to(losses.dtype)}
    return Loss(
        (weights * losses).sum(), {name: (weights * part).sum().detach() for name, part in parts.items()}
    )
