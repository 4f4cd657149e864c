"""Simple preference optimisation (Meng et al. 2024): mean log-probabilities, no reference."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from training.objectives.base import Loss, Sequences
from training.objectives.pairs import PairObjective, pair_loss, paired
from training.objectives.tokens import Tokens, sequence_log_probs

if TYPE_CHECKING:
    from torch import Tensor


class SimPO(PairObjective):
    """The loss per pair: −log σ(β·(margin of mean log-probabilities) − γ)."""

    name: Literal["simpo"] = "simpo"
    beta: float = Field(10.0, gt=0, description="Scale of the margin.")
    gamma: float = Field(3.0, ge=0, description="Target margin, after scaling.")

    def loss(self, tokens: Tokens, sequences: Sequences, coefficients: Mapping[str, float]) -> Loss:
        means = sequence_log_probs(tokens, len(sequences.weights)) / sequences.counted
        chosen, rejected = paired(sequences)
        weights = sequences.weights[chosen]
        return simpo(means[chosen], means[rejected], weights, beta=self.beta, gamma=self.gamma)


def simpo(chosen: Tensor, rejected: Tensor, weights: Tensor, *, beta: float, gamma: float) -> Loss:
    """l = −log σ(β·(l̄_w − l̄_l) − γ)  (eq. 6)

    Args:
        chosen, rejected: [pairs] log-probabilities, each the mean over a sequence's tokens.
        weights: [pairs].
    """
    from torch.nn.functional import logsigmoid

    margins = beta * (chosen - rejected)
    return pair_loss(-logsigmoid(margins - gamma), margins, weights)
