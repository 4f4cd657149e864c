"""Advantage-weighted regression on scored tokens, and reward-weighted regression (Korbak et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from training.objectives.base import Loss, Need, Objective, Sequences, Step
from training.objectives.tokens import Tokens, target_log_probs, token_weights

if TYPE_CHECKING:
    from torch import Tensor


class AWR(Objective):
    """The loss per token: α·w·(−log p) + (1 − α)·(R − V)², w = e^((R − V)/β), R the negative score of the token.

    With ``alpha: 1`` and ``value_head: false`` it is reward-weighted regression: w = e^(R/β).
    """

    name: Literal["awr"] = "awr"
    alpha: float = Field(
        0.5, ge=0, le=1, description="Weight of the likelihood; the value loss has the rest."
    )
    beta: float = Field(
        1.0, gt=0, description="Advantages are divided by this; the smaller, the more the best count."
    )
    value_head: bool = Field(
        True, description="Whether a linear head on the last hidden state learns the value V; false: V is 0."
    )
    detached: bool = Field(False, description="Whether the value loss trains only the head.")
    highest: float = Field(1000.0, gt=0, description="Weights are capped at this.")

    @model_validator(mode="after")
    def _learned(self) -> AWR:
        if not self.value_head and self.alpha != 1:
            raise ValueError(
                f"alpha: {self.alpha}, but without a value head there is no value to learn; set it to 1"
            )
        if self.value_head and self.alpha == 1:
            raise ValueError("alpha: 1 leaves the value head untrained; lower it, or set value_head to false")
        return self

    @property
    def needs(self) -> frozenset[Need]:
        own: set[Need] = {"token scores", "value head"} if self.value_head else {"token scores"}
        return frozenset(own)

    @property
    def detaches_value(self) -> bool:
        return self.detached

    def mass(self, sequences: Sequences) -> Tensor:
        return (sequences.counted * sequences.weights).sum()

    def loss(self, tokens: Tokens, sequences: Sequences, coefficients: Mapping[str, float]) -> Loss:
        assert tokens.scores is not None, "required by the objective"
        return awr(
            target_log_probs(tokens.log_probs, tokens.targets),
            -tokens.scores,
            tokens.values,
            token_weights(sequences.weights, tokens),
            alpha=self.alpha,
            beta=self.beta,
            highest=self.highest,
        )

    def adapt(
        self, coefficients: Mapping[str, float], sums: Mapping[str, float], step: Step
    ) -> tuple[dict[str, float], dict[str, float]]:
        if step.mass <= 0:
            return dict(coefficients), {}
        means = {name: value / step.mass for name, value in sums.items()}
        figures = {"mean weight": means["weight"], "mean reward": means["reward"]}
        if self.value_head:
            figures |= {"mean value": means["value"], "value loss": means["value_loss"]}
            spread = (means["value²"] - means["value"] ** 2) * (means["reward²"] - means["reward"] ** 2)
            if spread > 0:
                together = means["value·reward"] - means["value"] * means["reward"]
                figures["correlation of value and reward"] = together / spread**0.5
        return dict(coefficients), figures


def awr(
    log_probs: Tensor,
    rewards: Tensor,
    values: Tensor | None,
    weights: Tensor,
    *,
    alpha: float,
    beta: float,
    highest: float,
) -> Loss:
    """l_t = −α·min(e^(A_t/β), highest)·log p_t + (1 − α)·(R_t − V_t)²,  A_t = R_t − V_t, detached

    Args:
        log_probs, rewards, weights: [N] of the targets.
        values: [N] V at the position that predicts the target; None: 0, and no value loss.
    """
    known = log_probs.new_zeros(log_probs.shape) if values is None else values.to(log_probs.dtype)
    rewards, known_now = rewards.to(log_probs.dtype), known.detach()
    advantages = ((rewards - known_now) / beta).exp().clamp(max=highest)
    losses = -alpha * advantages * log_probs
    parts = {"weight": advantages, "reward": rewards}
    if values is not None:
        squares = (rewards - known).square()
        losses = losses + (1 - alpha) * squares
        parts |= {
            "value": known_now,
            "value_loss": squares,
            "value²": known_now.square(),
            "reward²": rewards.square(),
            "value·reward": known_now * rewards,
        }
    return Loss(
        (weights * losses).sum(), {name: (weights * part).sum().detach() for name, part in parts.items()}
    )
