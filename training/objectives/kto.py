"""Kahneman–Tversky optimisation (Ethayarajh et al. 2024): texts that are individually good or bad, without pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from training.objectives.base import CHOSEN, REJECTED, Loss, Need, Objective, Sequences, Step
from training.objectives.pairs import log_ratios
from training.objectives.tokens import Tokens

if TYPE_CHECKING:
    from torch import Tensor


class KTO(Objective):
    """A good text's log-ratio to the reference rises above that of mismatched texts, a bad one's falls below."""

    name: Literal["kto"] = "kto"
    beta: float = Field(0.1, gt=0, description="How strongly the policy is kept near the reference.")
    desirable_weight: float = Field(1.0, ge=0, description="Weight of good texts (λ_D).")
    undesirable_weight: float = Field(1.0, ge=0, description="Weight of bad texts (λ_U).")
    reference: Literal["base", "parent"] = Field(
        "base", description="The reference: the base policy, or the policy this iteration started from."
    )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference log-probs", "mismatched"})

    @property
    def reference_policy(self) -> Literal["base", "parent"]:
        return self.reference

    def mass(self, sequences: Sequences) -> Tensor:
        return sequences.weights.sum()

    def before_step(self, mismatched: Tokens, sequences: Sequences) -> Mapping[str, Tensor]:
        """The weighted sum of log-ratios of texts after prompts that they do not belong to."""
        ratios = log_ratios(mismatched, sequences)
        return {"mismatched": (sequences.weights.to(ratios.dtype) * ratios).sum()}

    def loss(self, tokens: Tokens, sequences: Sequences, coefficients: Mapping[str, float]) -> Loss:
        return kto(
            log_ratios(tokens, sequences),
            sequences,
            max(0.0, coefficients["mismatched"]),
            beta=self.beta,
            desirable_weight=self.desirable_weight,
            undesirable_weight=self.undesirable_weight,
        )

    def adapt(
        self, coefficients: Mapping[str, float], sums: Mapping[str, float], step: Step
    ) -> tuple[dict[str, float], dict[str, float]]:
        means = {
            f"{kind} log ratio": sums[f"{kind}_ratio"] / sums[kind]
            for kind in ("desirable", "undesirable")
            if sums[kind] > 0
        }
        return dict(coefficients), means | {"kl": sums["kl"] / step.mass if step.mass > 0 else 0.0}


def kto(
    ratios: Tensor,
    sequences: Sequences,
    kl: float,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Loss:
    """Eq. 8 (λ_y − v), each loss with its sequence's weight:

    desirable: λ_D·(1 − σ(β·(r − z_0))),  undesirable: λ_U·(1 − σ(β·(z_0 − r))),  r = log π(y|x) − log π_ref(y|x)

    Args:
        ratios: [B] the log-ratios r, summed over the tokens of a sequence.
        sequences: role ``chosen`` is a desirable text, ``rejected`` an undesirable one.
        kl: z_0, at least 0: the mean of r over mismatched prompts and texts; no gradient flows through it.
    """
    import torch

    weights = sequences.weights.to(ratios.dtype)
    desirable, undesirable = sequences.roles == CHOSEN, sequences.roles == REJECTED
    good = desirable_weight * torch.sigmoid(-beta * (ratios - kl))  # 1 − σ(x) = σ(−x)
    bad = undesirable_weight * torch.sigmoid(-beta * (kl - ratios))
    losses = torch.where(desirable, good, torch.where(undesirable, bad, torch.zeros_like(ratios)))
    present = ratios.detach() * weights
    return Loss(
        (weights * losses).sum(),
        {
            "desirable": weights[desirable].sum(),
            "undesirable": weights[undesirable].sum(),
            "desirable_ratio": present[desirable].sum(),
            "undesirable_ratio": present[undesirable].sum(),
            "kl": kl * weights.sum(),
        },
    )
