"""Direct preference optimisation (Rafailov et al. 2023), with conservative labels (Mitchell 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from training.objectives.base import Loss, Sequences
from training.objectives.pairs import ReferencePairObjective, log_ratios, pair_loss, paired
from training.objectives.tokens import Tokens

if TYPE_CHECKING:
    from torch import Tensor


class DPO(ReferencePairObjective):
    """The loss per pair: −log σ(β·margin), the margin of the implicit rewards log π/π_ref."""

    name: Literal["dpo"] = "dpo"
    beta: float = Field(0.1, gt=0, description="How strongly the policy is kept near the reference.")
    label_smoothing: float = Field(
        0.0,
        ge=0,
        lt=0.5,
        description="Probability that a pair is the wrong way round (cDPO), e.g. the judge's inconsistency rate.",
    )

    def loss(self, tokens: Tokens, sequences: Sequences, coefficients: Mapping[str, float]) -> Loss:
        ratios, (chosen, rejected) = log_ratios(tokens, sequences), paired(sequences)
        return dpo(
            ratios[chosen],
            ratios[rejected],
            sequences.weights[chosen],
            beta=self.beta,
            label_smoothing=self.label_smoothing,
        )


def dpo(
    chosen: Tensor, rejected: Tensor, weights: Tensor, *, beta: float, label_smoothing: float = 0.0
) -> Loss:
    """DPO (eq. 7), with label smoothing ε as in cDPO:

    l = −(1 − ε)·log σ(β·(r_w − r_l)) − ε·log σ(−β·(r_w − r_l)),  r = log π(y|x) − log π_ref(y|x)

    Args:
        chosen, rejected: [pairs] the log-ratios r, summed over the tokens of a sequence.
        weights: [pairs].
    """
    from torch.nn.functional import logsigmoid

    margins = beta * (chosen - rejected)
    losses = -(1 - label_smoothing) * logsigmoid(margins) - label_smoothing * logsigmoid(-margins)
    return pair_loss(losses, margins, weights)
