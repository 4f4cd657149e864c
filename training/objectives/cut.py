"""Contrastive unlikelihood training (Xu et al. 2024): a judgment shows which tokens of a text are at fault."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from training.objectives.base import Loss, Need, Objective, Sequences, Step
from training.objectives.tokens import Tokens, log_complement, sequence_means, target_log_probs

if TYPE_CHECKING:
    from torch import Tensor


class CUT(Objective):
    """A text is read under its judgment and, if that finds fault, under the bare prompt too.

    Tokens that the judgment makes more likely are the ones it complains about: under the bare prompt they are
    trained to be unlikely, all others likely. Under the judgment the whole text is trained to be likely.
    """

    name: Literal["cut"] = "cut"
    threshold: float = Field(
        1.1,
        gt=0,
        description="A token is flagged if the judgment makes it more than this many times as likely (λ).",
    )
    weight: float = Field(1.0, ge=0, description="Weight of the unlikelihood of flagged tokens (α).")
    gamma: float = Field(
        0.0,
        ge=0,
        description="Flagged tokens weigh α·p^γ, where p is their probability under the judgment; 0: all equally.",
    )
    combine: Literal["mean", "sum"] = Field(
        "mean",
        description="How the losses under the judgment and under the bare prompt are combined: mean, as in the "
        "released code, or sum, as in the paper.",
    )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"second context"})

    def mass(self, sequences: Sequences) -> Tensor:
        """The sum of the sequences' weights: a text counts the same whatever its length and micro-batch."""
        return sequences.weights.sum()

    def loss(self, tokens: Tokens, sequences: Sequences, coefficients: Mapping[str, float]) -> Loss:
        assert tokens.second is not None and tokens.second_places is not None, "required by the objective"
        places = tokens.second_places
        return cut(
            target_log_probs(tokens.log_probs, tokens.targets),
            target_log_probs(tokens.second, tokens.targets[places]),
            places,
            tokens.rows,
            sequences,
            threshold=self.threshold,
            weight=self.weight,
            gamma=self.gamma,
            share=0.5 if self.combine == "mean" else 1.0,
        )

    def adapt(
        self, coefficients: Mapping[str, float], sums: Mapping[str, float], step: Step
    ) -> tuple[dict[str, float], dict[str, float]]:
        judged = sums["judged"]
        if judged <= 0:
            return dict(coefficients), {}
        figures = {"flagged share": sums["flagged"] / judged, "log ratio": sums["log_ratio"] / judged}
        return dict(coefficients), figures


def cut(
    first: Tensor,
    second: Tensor,
    places: Tensor,
    rows: Tensor,
    sequences: Sequences,
    *,
    threshold: float,
    weight: float,
    gamma: float,
    share: float,
) -> Loss:
    """The sum over texts of weight · l. For a text of n tokens without fault:

    l = −1/n Σ log p_t

    and for one with a judgment j, where p_t = p(y_t|y_<t, x, j), q_t = p(y_t|y_<t, x), and flagged iff p_t/q_t > λ:

    l = share · (−1/n Σ log p_t − 1/n Σ [flagged: α·p_t^γ·log(1 − q_t), else: log q_t])

    This is the released code's loss with one text per process, averaged over processes. No gradient flows
    through the ratio or p^γ.

    Args:
        first: [N] log-probabilities of the targets under the first context (log p).
        second: [M] those of M of the targets under the second context (log q).
        places: [M] the indices of these M among the N targets.
        rows: [N] see ``Tokens``.
    """
    import torch

    judged = torch.zeros_like(sequences.weights, dtype=torch.bool)
    judged[rows[places]] = True
    # Compared as logarithms, so that probabilities that underflow to 0 still compare.
    ratios = (first[places] - second).detach()
    flagged = ratios > math.log(threshold)
    weights = weight * torch.exp(gamma * first[places].detach())
    unlike = -torch.where(flagged, weights * log_complement(second), second)
    under_judgment = sequence_means(-first, rows, sequences.counted)
    bare = sequence_means(unlike, rows[places], sequences.counted)
    each = torch.where(judged, share * (under_judgment + bare), under_judgment)
    present = (sequences.weights > 0)[rows[places]]
    return Loss(
        (sequences.weights.to(first.dtype) * each).sum(),
        {
            "judged": present.sum().to(first.dtype),
            "flagged": (present & flagged).sum().to(first.dtype),
            "log_ratio": (present * ratios).sum(),
        },
    )
