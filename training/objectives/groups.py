"""Shared parts of policy gradients over groups: a prompt's samples are compared with each other by reward."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from pydantic import Field

from training.objectives.base import Need, Objective, Sequences

if TYPE_CHECKING:
    from torch import Tensor


class GroupObjective(Objective):
    """A mean over sequences; all sequences of a group share a micro-batch, and each has a reward."""

    epsilon: float = Field(
        0.2,
        gt=0,
        description="The probability ratio is clipped to 1 − ε … 1 + ε where that lowers the gain.",
    )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"groups", "rewards"})

    def mass(self, sequences: Sequences) -> Tensor:
        return sequences.weights.sum()


class Group(NamedTuple):
    """Sums over the group of each sequence, [B] each; a sequence of weight 2 counts twice."""

    size: Tensor
    total: Tensor
    squares: Tensor  # squared distances from the mean


def group_sums(values: Tensor, sequences: Sequences) -> Group:
    """Weighted sums of ``values`` ([B], finite) over groups; a sequence without one (-1) is a group by itself."""
    import torch

    alone = sequences.groups < 0
    names = torch.where(alone, -1 - torch.arange(len(alone), device=alone.device), sequences.groups)
    same = (names[:, None] == names[None, :]).to(values.dtype)
    weights = sequences.weights.to(values.dtype)
    size, total = same @ weights, same @ (weights * values)
    mean = total / size.clamp(min=1e-12)
    distances = (values[None, :] - mean[:, None]) ** 2
    return Group(size, total, (same * distances) @ weights)


def clipped_gain(ratios: Tensor, advantages: Tensor, epsilon: float) -> Tensor:
    """min(ρ·A, clip(ρ, 1 − ε, 1 + ε)·A)  (Schulman et al. 2017, eq. 7); any shape."""
    import torch

    clipped = ratios.clamp(1 - epsilon, 1 + epsilon)
    return torch.minimum(ratios * advantages, clipped * advantages)
