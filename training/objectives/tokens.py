"""Log-probabilities of the labelled tokens of a batch: the input of every objective.

Only tokens with a label count. Labels are token ids, and ``IGNORE`` (-100) marks positions that are
not trained on (prompt, condition, padding); a token is never left out because of its probability.

Shapes: B sequences, T positions, V vocabulary entries, and N labelled tokens of the whole batch. All
functions work on the N labelled tokens only, which keeps a large vocabulary affordable;
``Tokens.rows`` is the sequence that a token belongs to.

All quantities are in nats, in float32 (float64 if the logits are).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

IGNORE = -100

FLOOR = 1e-20
"""Lower bound of 1 − p inside a logarithm."""

KLDirection = Literal["reference_to_policy", "policy_to_reference"]


class Tokens(NamedTuple):
    """The labelled tokens of a batch, in row-major order.

    Fields from ``scores`` on are set only if the objective needs them, see :data:`training.objectives.base.Need`.
    """

    log_probs: Tensor  # [N, V]
    targets: Tensor  # [N] token ids
    rows: Tensor  # [N] index of the token's sequence in the batch
    scores: Tensor | None = None  # [N] score of each token, from the example's spans
    reference: Tensor | None = None  # [N, v] log-probabilities under the reference
    reference_log_probs: Tensor | None = None  # [N] log-probability of each target under the reference
    second: Tensor | None = None  # [M, V] under the second context, of targets whose sequence has one
    second_places: Tensor | None = None  # [M] their indices among the N targets
    values: Tensor | None = None  # [N] the value head's output where each target is predicted
    outputs: Tensor | None = None  # [B] the score head's output for each sequence; log_probs is then empty


def labelled(logits: Tensor, labels: Tensor) -> Tokens:
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


def chosen_tokens(logits: Tensor, targets: Tensor, rows: Tensor) -> Tokens:
    """Log-probabilities of tokens that are already selected.

    Args:
        logits: [N, V], at the positions that predict them.
        targets: [N]; rows: [N], see ``Tokens``.
    """
    import torch

    wide = logits if logits.dtype == torch.float64 else logits.float()
    return Tokens(torch.log_softmax(wide, dim=-1), targets, rows)


def target_log_probs(log_probs: Tensor, targets: Tensor) -> Tensor:
    """log p of every labelled token: [N, V] and [N] -> [N]."""
    return log_probs.gather(-1, targets[:, None])[:, 0]


def log_complement(log_probs: Tensor) -> Tensor:
    """log(1 − p) from log p, at least log 1e-20 (Korbak et al. 2023): [N] -> [N].

    No cancellation for small p. Where p rounds to 1 the floor applies, and no gradient flows.
    """
    import torch

    lowest = math.log(FLOOR)
    certain = log_probs > -FLOOR
    safe = torch.where(certain, torch.full_like(log_probs, -1.0), log_probs)
    exact = torch.log(-torch.expm1(safe))
    return torch.where(certain, torch.full_like(safe, lowest), exact).clamp(min=lowest)


def per_sequence(values: Tensor, rows: Tensor, sequences: int) -> Tensor:
    """Sums over the tokens of each sequence: [N] -> [B]."""
    return values.new_zeros(sequences).index_add(0, rows, values)


def sequence_log_probs(tokens: Tokens, sequences: int) -> Tensor:
    """log π(y|x) of every sequence, summed over its tokens, [B]."""
    return per_sequence(target_log_probs(tokens.log_probs, tokens.targets), tokens.rows, sequences)


def sequence_means(values: Tensor, rows: Tensor, counted: Tensor) -> Tensor:
    """Means over the tokens of each sequence: [N] -> [B].

    Args:
        counted: [B] number of tokens in each.
    """
    return per_sequence(values, rows, len(counted)) / counted.clamp(min=1).to(values.dtype)


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

    To compare a policy whose vocabulary has grown (quantile tokens) with a reference that lacks the
    new tokens, the new columns are dropped, as published for Quark and ALT (toxicity).
    """
    return log_probs[..., :vocabulary].log_softmax(-1)


def token_weights(weights: Tensor, tokens: Tokens) -> Tensor:
    """The weight of every labelled token, [N]: that of its sequence."""
    return weights.to(tokens.log_probs.dtype)[tokens.rows]
