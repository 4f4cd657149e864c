"""Identity preference optimisation (Azar et al. 2023), with log-ratios averaged over tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from training.objectives.base import Loss, Need, Objective, Sequences
from training.objectives.pairs import log_ratios, mass_of_pairs, paired
from training.objectives.tokens import Tokens

if TYPE_CHECKING:
    from torch import Tensor


class IPO(Objective):
    """The loss per pair: the squared distance of the mean log-ratios' margin from 1/(2τ)."""

    name: Literal["ipo"] = "ipo"
    tau: float = Field(
        0.1, gt=0, description="The margin of a pair is pulled towards 1/(2τ), and no further."
    )
    reference: Literal["base", "parent"] = Field(
        "base", description="The reference: the base policy, or the policy this iteration started from."
    )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference log-probs", "groups"})

    @property
    def reference_policy(self) -> Literal["base", "parent"]:
        return self.reference

    def mass(self, sequences: Sequences) -> Tensor:
        return mass_of_pairs(sequences)

    def loss(self, tokens: Tokens, sequences: Sequences, coefficients: Mapping[str, float]) -> Loss:
        # A sequence has at least one token: no division by 0, also where policy and reference agree.
        means = log_ratios(tokens, sequences) / sequences.counted
        chosen, rejected = paired(sequences)
        return ipo(means[chosen], means[rejected], sequences.weights[chosen], tau=self.tau)


def ipo(chosen: Tensor, rejected: Tensor, weights: Tensor, *, tau: float) -> Loss:
    """l = (r̄_w − r̄_l − 1/(2τ))²  (eq. 17, on means over tokens instead of sums)

    Args:
        chosen, rejected: [pairs] log-ratios, each the mean over a sequence's tokens.
        weights: [pairs].
    """
    margins = chosen - rejected
    weights = weights.to(margins.dtype)
    parts = {"margin": margins, "accuracy": (margins > 0).to(margins.dtype)}
    return Loss(
        (weights * (margins - 1 / (2 * tau)) ** 2).sum(),
        {name: (weights * part).sum().detach() for name, part in parts.items()},
    )
