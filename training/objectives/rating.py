"""Regression on ratings (Bansal et al. 2024, "Peering through preferences"): a reward model trained on ratings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from training.objectives.base import Loss, Need, Objective, Sequences
from training.objectives.tokens import Tokens

if TYPE_CHECKING:
    from torch import Tensor


class Rating(Objective):
    """The squared distance of σ(score) from the rating, which is between 0 (worst) and 1 (best)."""

    name: Literal["rating"] = "rating"

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"score head", "rewards"})

    def mass(self, sequences: Sequences) -> Tensor:
        return sequences.weights.sum()

    def loss(self, tokens: Tokens, sequences: Sequences, coefficients: Mapping[str, float]) -> Loss:
        assert tokens.outputs is not None, "required by the objective"
        return rating(tokens.outputs, sequences.rewards, sequences.weights)


def rating(outputs: Tensor, ratings: Tensor, weights: Tensor) -> Loss:
    """l = (σ(s) − r)²; all [B]."""
    losses = (outputs.sigmoid() - ratings.to(outputs.dtype)) ** 2
    weights = weights.to(outputs.dtype)
    absolute = (weights * losses.detach().sqrt()).sum()
    return Loss((weights * losses).sum(), {"absolute error": absolute})
