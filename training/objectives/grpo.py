"""Group relative policy optimisation (Shao et al. 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from training.objectives.base import Loss, Need, Sequences
from training.objectives.groups import GroupObjective, clipped_gain, group_sums
from training.objectives.tokens import Tokens, sequence_means, target_log_probs

if TYPE_CHECKING:
    from torch import Tensor


class GRPO(GroupObjective):
    """Raises a token's probability, relative to the policy that sampled it, by how much its sample's reward
    exceeds its group's mean."""

    name: Literal["grpo"] = "grpo"
    kl_coef: float = Field(0.0, ge=0, description="Weight of the KL to the sampling policy (β).")
    scale_rewards: bool = Field(
        True, description="Divide advantages by the standard deviation of the group's rewards."
    )

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | {"reference log-probs"}

    @property
    def reference_policy(self) -> Literal["parent"]:
        """The sampling policy."""
        return "parent"

    def loss(self, tokens: Tokens, sequences: Sequences, coefficients: Mapping[str, float]) -> Loss:
        assert tokens.reference_log_probs is not None, "required by the objective"
        return grpo(
            target_log_probs(tokens.log_probs, tokens.targets),
            tokens.reference_log_probs,
            advantages(sequences.rewards, sequences, scale=self.scale_rewards),
            tokens.rows,
            sequences,
            epsilon=self.epsilon,
            kl_coef=self.kl_coef,
        )


def advantages(rewards: Tensor, sequences: Sequences, *, scale: bool) -> Tensor:
    """A_i = (r_i − mean of the group) / (its standard deviation + 1e-4), [B].

    The standard deviation is the unbiased one, as in TRL. Equal rewards, and a single sequence, give 0.
    """
    size, total, squares = group_sums(rewards, sequences)
    centred = rewards - total / size.clamp(min=1e-12)
    return centred / ((squares / (size - 1).clamp(min=1)).sqrt() + 1e-4) if scale else centred


def grpo(
    log_probs: Tensor,
    sampled: Tensor,
    advantages: Tensor,
    rows: Tensor,
    sequences: Sequences,
    *,
    epsilon: float,
    kl_coef: float,
) -> Loss:
    """Eq. 3 of the paper: for each sequence the mean over its tokens of

    l_t = −min(ρ_t·A, clip(ρ_t, 1 − ε, 1 + ε)·A) + β·(e^d_t − d_t − 1),  ρ_t = π/π_old, d_t = log π_old − log π

    Args:
        log_probs, sampled: [N] of the targets, under the policy and under the sampling policy.
        advantages: [B]; rows: [N].
    """
    gaps = log_probs - sampled
    ratios, gains = gaps.exp(), advantages.to(gaps.dtype)[rows]
    penalty = (-gaps).exp() + gaps - 1
    losses = -clipped_gain(ratios, gains, epsilon) + kl_coef * penalty
    weights = sequences.weights.to(gaps.dtype)

    def total(values: Tensor) -> Tensor:
        return (weights * sequence_means(values, rows, sequences.counted)).sum()

    parts = {"kl": penalty, "clipped share": ((ratios - 1).abs() > epsilon).to(gaps.dtype)}
    return Loss(total(losses), {name: total(part).detach() for name, part in parts.items()})
