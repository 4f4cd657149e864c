"""Unlikelihood on tokens that feedback marks (Korbak et al. 2023, after Welleck et al. 2020)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from training.objectives.base import Loss, Need, Objective, Sequences, Step
from training.objectives.tokens import Tokens, log_complement, target_log_probs, token_weights

if TYPE_CHECKING:
    from torch import Tensor


class Unlikelihood(Objective):
    """The loss per token: −log p, or −α·log(1 − p) if the feedback marks the token."""

    name: Literal["unlikelihood"] = "unlikelihood"
    alpha: float = Field(1.0, ge=0, description="Weight of the unlikelihood of marked tokens.")
    mode: Literal["hard", "soft"] = Field(
        "hard",
        description="hard: a token is marked if its score is above `threshold`; soft: a token with score s counts "
        "as marked to the degree s, clipped to 0 … 1.",
    )
    threshold: float = Field(
        0.0, description="Scores above this mark a token (mode hard). 0 is a threshold too."
    )

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"token scores"})

    def mass(self, sequences: Sequences) -> Tensor:
        return (sequences.counted * sequences.weights).sum()

    def loss(self, tokens: Tokens, sequences: Sequences, coefficients: Mapping[str, float]) -> Loss:
        assert tokens.scores is not None, "required by the objective"
        aligned = (
            (tokens.scores <= self.threshold).to(tokens.log_probs.dtype)
            if self.mode == "hard"
            else (1 - tokens.scores).clamp(0, 1)
        )
        return unlikelihood(
            target_log_probs(tokens.log_probs, tokens.targets),
            aligned,
            token_weights(sequences.weights, tokens),
            alpha=self.alpha,
        )

    def adapt(
        self, coefficients: Mapping[str, float], sums: Mapping[str, float], step: Step
    ) -> tuple[dict[str, float], dict[str, float]]:
        marked = sums["marked"]
        figures = {"marked share": marked / step.mass} if step.mass > 0 else {}
        if marked > 0:
            figures["probability of marked tokens"] = sums["marked_probability"] / marked
        return dict(coefficients), figures


def unlikelihood(log_probs: Tensor, aligned: Tensor, weights: Tensor, *, alpha: float) -> Loss:
    """l_t = −a_t·log p_t − α·(1 − a_t)·log max(1 − p_t, 1e-20)

    Args:
        log_probs: [N] of the targets.
        aligned: [N] a_t, from 0 (marked) to 1 (not marked).
        weights: [N].
    """
    marked = 1 - aligned
    losses = -aligned * log_probs - alpha * marked * log_complement(log_probs)
    return Loss(
        (weights * losses).sum(),
        {
            "marked": (weights * marked).sum().detach(),
            "marked_probability": (weights * marked * log_probs.exp()).sum().detach(),
        },
    )
