"""Objectives: pure functions of logits, labels and per-sample weights.

Only tokens with a label count. Labels are token ids, and ``IGNORE`` (-100) marks positions that are
not trained on (prompt, condition, padding); a token is never left out because of its probability.

Shapes: B samples, T positions, V vocabulary entries, and N labelled tokens of the whole batch. The
functions work on the N labelled tokens only, which is what keeps a large vocabulary affordable;
``Outputs.rows`` says which sample a token belongs to, so that objectives on whole sequences
(a sum per sample) can be built from the same pieces.

All quantities are in nats, in float32 (float64 if the logits are).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

IGNORE = -100

KLDirection = Literal["reference_to_policy", "policy_to_reference"]


class Outputs(NamedTuple):
    """The labelled tokens of a batch, in row-major order."""

    log_probs: Tensor  # [N, V]
    targets: Tensor  # [N] token ids
    rows: Tensor  # [N] index of the token's sample in the batch


class Objective(NamedTuple):
    """Weighted sums over the labelled tokens of a (micro-)batch; divide by a mass for means."""

    total: Tensor  # scalar, differentiable: what is minimised
    nll: Tensor  # scalar, detached, as the rest
    entropy: Tensor | None  # None: not part of the objective
    kl: Tensor | None  # None: not part of the objective
    mass: Tensor  # scalar: sum of the tokens' weights


def labelled(logits: Tensor, labels: Tensor) -> Outputs:
    """Log-probabilities at the labelled positions.

    Args:
        logits: [B, T, V]; position t predicts token t + 1, so the last position is not used.
        labels: [B, T]; ``labels[:, t]`` is the token *at* t, or ``IGNORE``. The shift is done here.
            A label at t = 0 has nothing to predict it from and is not counted.
    """
    shifted = labels[:, 1:]
    mask = shifted != IGNORE
    chosen = logits[:, :-1][mask]
    return chosen_tokens(chosen, shifted[mask], mask.nonzero()[:, 0])


def chosen_tokens(logits: Tensor, targets: Tensor, rows: Tensor) -> Outputs:
    """Log-probabilities of tokens that are chosen already.

    Args:
        logits: [N, V], of the positions that predict them.
        targets: [N]; rows: [N], see ``Outputs``.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return Outputs(torch.log_softmax(wide, dim=-1), targets, rows)


def token_nll(outputs: Outputs) -> Tensor:
    """-log p of every labelled token, [N]."""
    return -outputs.log_probs.gather(-1, outputs.targets[:, None])[:, 0]


def entropy(log_probs: Tensor) -> Tensor:
    """Entropy over the full vocabulary, [..., V] -> [...]."""
    return -(log_probs.exp() * log_probs).sum(-1)


def kl(policy: Tensor, reference: Tensor, direction: KLDirection) -> Tensor:
    """Divergence over the full vocabulary, [..., V] and [..., V] log-probabilities -> [...].

    ``policy_to_reference`` is KL(policy || reference), as in Quark's released code (Lu et al. 2022);
    ``reference_to_policy`` is KL(reference || policy), as in ALT (Lloret et al. 2024).
    """
    of, to = (policy, reference) if direction == "policy_to_reference" else (reference, policy)
    return (of.exp() * (of - to)).sum(-1)


def restrict(log_probs: Tensor, vocabulary: int) -> Tensor:
    """The distribution over the first ``vocabulary`` entries, renormalised: [..., V] -> [..., v].

    A policy whose vocabulary has grown (quantile tokens) is compared with a reference that does not
    know the new tokens after dropping the new columns, as published for Quark and ALT (toxicity).
    """
    return log_probs[..., :vocabulary].log_softmax(-1)


def masked_nll(logits: Tensor, labels: Tensor, weights: Tensor | None = None) -> Tensor:
    """Weighted mean of -log p over the labelled tokens of this batch, a scalar.

    Args:
        logits: [B, T, V].
        labels: [B, T], ``IGNORE`` where masked.
        weights: [B], at least 0; None: all 1.
    """
    outputs = labelled(logits, labels)
    token_weights = token_weight(outputs, weights)
    return (token_weights * token_nll(outputs)).sum() / token_weights.sum()


def token_weight(outputs: Outputs, weights: Tensor | None) -> Tensor:
    """The weight of every labelled token, [N]: that of its sample."""
    nll_like = outputs.log_probs[:, 0]
    return torch.ones_like(nll_like) if weights is None else weights.to(nll_like.dtype)[outputs.rows]


def conditional_mle(
    outputs: Outputs,
    weights: Tensor | None,
    *,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    kl_direction: KLDirection = "reference_to_policy",
    reference: Tensor | None = None,
) -> Objective:
    """Conditional maximum likelihood with an entropy bonus and a KL penalty, as sums.

    total = sum_t w_t [ -log p(y_t) + kl_coef * KL_t - entropy_coef * H_t ]   (ALT, eq. of the token loss)

    The mean is ``total / mass``. Callers that spread one optimizer step over several micro-batches
    or processes divide by the mass of the *whole* step: a token then counts the same wherever it
    landed (a mean of micro-batch means would weigh tokens of short batches more).

    Args:
        outputs: the labelled tokens, see ``labelled``.
        weights: [B] per-sample weights; None: all 1.
        reference: [N, v] reference log-probabilities of the same tokens, v <= V; needed if
            ``kl_coef`` is not 0. If v < V the policy's columns from v on are dropped (``restrict``).

    Raises:
        ValueError: ``kl_coef`` without a reference, or a reference of other tokens or vocabulary.
    """
    weight = token_weight(outputs, weights)
    nll = (weight * token_nll(outputs)).sum()
    total, entropies, divergences = nll, None, None
    if kl_coef != 0:
        if reference is None:
            raise ValueError("a KL term (kl_coef != 0) needs the reference's log-probabilities")
        tokens, vocabulary = outputs.log_probs.shape
        if reference.shape[0] != tokens or reference.shape[1] > vocabulary:
            raise ValueError(
                f"reference log-probabilities have shape {tuple(reference.shape)}; expected "
                f"{tokens} tokens and at most {vocabulary} vocabulary entries"
            )
        policy = outputs.log_probs
        if reference.shape[1] < vocabulary:
            policy = restrict(policy, reference.shape[1])
        divergences = (weight * kl(policy, reference, kl_direction)).sum()
        total = total + kl_coef * divergences
    if entropy_coef != 0:
        entropies = (weight * entropy(outputs.log_probs)).sum()
        total = total - entropy_coef * entropies
    return Objective(
        total=total,
        nll=nll.detach(),
        entropy=None if entropies is None else entropies.detach(),
        kl=None if divergences is None else divergences.detach(),
        mass=weight.sum().detach(),
    )
