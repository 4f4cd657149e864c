"""Identity preference optimisation (Azar et al. 2023), with log-ratios averaged over tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from training.objectives.base import Loss, Sequences
from training.objectives.pairs import ReferencePairObjective, log_ratios, pair_loss, paired
from training.objectives.tokens import Tokens

if TYPE_CHECKING:
    from torch import Tensor


class IPO(ReferencePairObjective):
    """The loss per pair: the squared distance of the mean log-ratios' margin from 1/(2τ)."""

    name: Literal["ipo"] = "ipo"
    tau: float = Field(
        0.1, gt=0, description="The margin of a pair is pulled towards 1/(2τ), and no further."
    )

    def loss(self, tokens: Tokens, sequences: Sequences, coefficients: Mapping[str, float]) -> Loss:
        # A sequence has at least one token: no division by 0, even where policy and reference agree.
        means, (chosen, rejected) = log_ratios(tokens, sequences) / sequences.counted, paired(sequences)
        return ipo(means[chosen], means[rejected], sequences.weights[chosen], tau=self.tau)


def ipo(chosen: Tensor, rejected: Tensor, weights: Tensor, *, tau: float) -> Loss:
    """l = (r̄_w − r̄_l − 1/(2τ))²  (eq. 17, on means over tokens instead of sums)

    Args:
        chosen, rejected: [pairs] log-ratios, each the mean over a sequence's tokens.
        weights: [pairs].
    """
    margins = chosen - rejected
    return pair_loss((margins - 1 / (2 * tau)) ** 2, margins, weights)
