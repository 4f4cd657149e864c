"""Masked negative log-likelihood, with the entropy bonus and KL penalty of Quark and ALT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from training.objectives.base import Loss, Need, Objective, Sequences, Step
from training.objectives.tokens import (
    KLDirection,
    Tokens,
    entropy,
    kl,
    restrict,
    target_log_probs,
    token_weights,
)

if TYPE_CHECKING:
    from torch import Tensor

Target = Annotated[float, Field(gt=0)]

LIMIT = 0.2  # bound on the relative error that a step reacts to


class NLL(Objective):
    """The loss per generated token: −log p + kl_coef·KL − entropy_coef·H."""

    name: Literal["nll"] = "nll"
    entropy_coef: float = Field(0.06, ge=0, description="Weight of the entropy bonus (alpha).")
    kl_coef: float = Field(0.0, ge=0, description="Weight of the KL to the reference (beta); 0: none.")
    kl_direction: KLDirection = Field(
        "reference_to_policy",
        description="reference_to_policy: KL(ref || pi) as ALT; policy_to_reference: KL(pi || ref) as Quark's code.",
    )
    kl_reference: Literal["base", "parent"] = Field(
        "base", description="The reference: the base policy, or the policy this iteration started from."
    )
    kl_reference_sees_condition: bool = Field(
        False, description="Whether the reference also reads the condition, not just the plain prompt."
    )
    kl_target: Target | None = Field(
        None,
        description="Adapts kl_coef after every step towards this KL of a whole sample, in nats; null: kl_coef "
        "is constant.",
    )
    entropy_target: Target | None = Field(
        None, description="Adapts entropy_coef likewise towards this entropy of a whole sample, in nats."
    )
    controller_horizon: float = Field(
        2500.0, gt=0, description="Rows over which an adapted coefficient changes by at most 20 %."
    )

    @model_validator(mode="after")
    def _controllable(self) -> NLL:
        for name, target, coef in (
            ("kl", self.kl_target, self.kl_coef),
            ("entropy", self.entropy_target, self.entropy_coef),
        ):
            if target is not None and coef == 0:
                raise ValueError(
                    f"{name}_target adapts {name}_coef by factors, which cannot move it away from 0; "
                    f"start {name}_coef above 0"
                )
        return self

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference"} if self.kl_coef > 0 else ())

    @property
    def reference_policy(self) -> Literal["base", "parent"] | None:
        return self.kl_reference if self.kl_coef > 0 else None

    @property
    def reference_sees_condition(self) -> bool:
        return self.kl_reference_sees_condition

    def identity(self) -> dict[str, Any]:
        # Earlier versions had only this objective, and no name for it.
        return self.model_dump(mode="json", exclude={"name"})

    def mass(self, sequences: Sequences) -> Tensor:
        return (sequences.counted * sequences.weights).sum()

    def loss(self, tokens: Tokens, sequences: Sequences, coefficients: Mapping[str, float]) -> Loss:
        loss = conditional_mle(
            tokens,
            sequences.weights,
            entropy_coef=coefficients.get("entropy_coef", self.entropy_coef),
            kl_coef=coefficients.get("kl_coef", self.kl_coef),
            kl_direction=self.kl_direction,
            reference=tokens.reference,
        )
        targets = {"kl": self.kl_target, "entropy": self.entropy_target}
        adapted = {name: part for name, part in loss.parts.items() if targets[name] is not None}
        return loss._replace(parts=adapted)

    def start(self) -> dict[str, float]:
        named = {
            "kl_coef": (self.kl_coef, self.kl_target),
            "entropy_coef": (self.entropy_coef, self.entropy_target),
        }
        return {name: coef for name, (coef, target) in named.items() if target is not None}

    def adapt(
        self, coefficients: Mapping[str, float], sums: Mapping[str, float], step: Step
    ) -> tuple[dict[str, float], dict[str, float]]:
        """The controllers published with Quark and ALT (toxicity).

        A coefficient is multiplied by ``1 ± clip(value / target - 1, ±0.2) * sequences / horizon``: too much
        KL raises the penalty, too much entropy lowers the bonus. As published, values are means over
        samples of the *sum* over a sample's tokens (targets such as KL 3 and entropy 40 over 20
        tokens refer to this).
        """
        if step.weight <= 0:
            return dict(coefficients), {}
        means = {name: value / step.weight for name, value in sums.items()}
        changed = dict(coefficients)
        for name, target, sign in (("kl", self.kl_target, 1), ("entropy", self.entropy_target, -1)):
            if target is not None and name in means:
                error = min(max(means[name] / target - 1, -LIMIT), LIMIT)
                changed[f"{name}_coef"] *= 1 + sign * error * step.sequences / self.controller_horizon
        return changed, means


def conditional_mle(
    tokens: Tokens,
    weights: Tensor,
    *,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    kl_direction: KLDirection = "reference_to_policy",
    reference: Tensor | None = None,
) -> Loss:
    """Conditional maximum likelihood with an entropy bonus and a KL penalty, as sums.

    total = sum_t w_t [ -log p(y_t) + kl_coef * KL_t - entropy_coef * H_t ]   (ALT, token-level loss)

    Its parts are the weighted sums ``kl`` and ``entropy``, as far as they are part of the objective.

    Args:
        weights: [B] weights of the sequences.
        reference: [N, v] reference log-probabilities of the same tokens, v <= V; required if
            ``kl_coef`` is not 0. If v < V the policy's columns from v on are dropped (``restrict``).

    Raises:
        ValueError: ``kl_coef`` without a reference, or a reference with another number of tokens or a larger
            vocabulary.
    """
    weight = token_weights(weights, tokens)
    total = (weight * -target_log_probs(tokens.log_probs, tokens.targets)).sum()
    parts: dict[str, Tensor] = {}
    if kl_coef != 0:
        if reference is None:
            raise ValueError("a KL term (kl_coef != 0) needs the reference's log-probabilities")
        count, vocabulary = tokens.log_probs.shape
        if reference.shape[0] != count or reference.shape[1] > vocabulary:
            raise ValueError(
                f"reference log-probabilities have shape {tuple(reference.shape)}; expected "
                f"{count} tokens and at most {vocabulary} vocabulary entries"
            )
        policy = tokens.log_probs
        if reference.shape[1] < vocabulary:
            policy = restrict(policy, reference.shape[1])
        divergences = (weight * kl(policy, reference, kl_direction)).sum()
        total = total + kl_coef * divergences
        parts["kl"] = divergences.detach()
    if entropy_coef != 0:
        entropies = (weight * entropy(tokens.log_probs)).sum()
        total = total - entropy_coef * entropies
        parts["entropy"] = entropies.detach()
    return Loss(total, parts)
