"""REINFORCE leave-one-out (Ahmadian et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from training.objectives.base import Loss, Need, Sequences
from training.objectives.groups import GroupObjective, clipped_gain, group_sums
from training.objectives.tokens import Tokens, per_sequence, sequence_log_probs

if TYPE_CHECKING:
    from torch import Tensor


class RLOO(GroupObjective):
    """Raises a sample's probability, relative to the policy that sampled it, by how much its reward exceeds the
    mean of its group's other samples."""

    name: Literal["rloo"] = "rloo"
    kl_coef: float = Field(
        0.05,
        ge=0,
        description="Weight of the KL to the reference in the reward: r − β·(log π_old − log π_ref).",
    )
    reference: Literal["base", "parent"] = Field(
        "base",
        description="The reference of that KL: the base policy, or the policy this iteration started from.",
    )

    @property
    def needs(self) -> frozenset[Need]:
        own: set[Need] = (
            {"sampled log-probs", "reference log-probs"} if self.kl_coef else {"sampled log-probs"}
        )
        return super().needs | own

    @property
    def reference_policy(self) -> Literal["base", "parent"] | None:
        return self.reference if self.kl_coef else None

    def loss(self, tokens: Tokens, sequences: Sequences, coefficients: Mapping[str, float]) -> Loss:
        size = len(sequences.weights)
        log_probs = sequence_log_probs(tokens, size)
        rewards = sequences.rewards.to(log_probs.dtype)
        sampled = sequences.sampled_log_probs.to(log_probs.dtype)
        if self.kl_coef:
            assert tokens.reference_log_probs is not None, "required by the objective"
            rewards = rewards - self.kl_coef * (
                sampled - per_sequence(tokens.reference_log_probs, tokens.rows, size)
            )
        return rloo(log_probs, sampled, left_out(rewards, sequences), sequences.weights, epsilon=self.epsilon)


def left_out(rewards: Tensor, sequences: Sequences) -> Tensor:
    """A_i = r_i − mean of the group's other rewards, [B]; 0 for a single sequence."""
    import torch

    size, total, _ = group_sums(rewards, sequences)
    others = (total - rewards) / (size - 1).clamp(min=1e-12)
    return torch.where(size > 1, rewards - others, torch.zeros_like(rewards))


def rloo(log_probs: Tensor, sampled: Tensor, advantages: Tensor, weights: Tensor, *, epsilon: float) -> Loss:
    """l = −min(ρ·A, clip(ρ, 1 − ε, 1 + ε)·A),  ρ = π(y|x)/π_old(y|x) of the whole sequence

    At the sampling policy, its gradient is that of −A·log π(y|x) (eq. 7). The ratio, as in TRL, corrects
    for the steps taken since.

    Args:
        log_probs, sampled, advantages, weights: [B], log-probabilities summed over a sequence.
    """
    ratios = (log_probs - sampled).exp()
    weights = weights.to(ratios.dtype)
    clipped = ((ratios - 1).abs() > epsilon).to(ratios.dtype)
    return Loss(
        -(weights * clipped_gain(ratios, advantages, epsilon)).sum(),
        {"clipped share": (weights * clipped).sum().detach()},
    )
