"""What objectives over preference pairs share: which sequences make a pair, and their log-ratios."""

from __future__ import annotations

from typing import TYPE_CHECKING

from training.objectives.base import CHOSEN, REJECTED, Sequences
from training.objectives.tokens import Tokens, per_sequence, target_log_probs

if TYPE_CHECKING:
    from torch import Tensor


def paired(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """The places of the chosen and of the rejected sequences, [pairs] each, pair by pair."""
    import torch

    def places(role: int) -> Tensor:
        found = (sequences.roles == role).nonzero()[:, 0]
        return found[torch.argsort(sequences.groups[found])]

    return places(CHOSEN), places(REJECTED)


def mass_of_pairs(sequences: Sequences) -> Tensor:
    """The sum of the pairs' weights; both sequences of a pair have the pair's weight."""
    return sequences.weights[sequences.roles == CHOSEN].sum()


def log_ratios(tokens: Tokens, sequences: Sequences) -> Tensor:
    """log π(y|x) − log π_ref(y|x) of every sequence, summed over its tokens, [B]."""
    assert tokens.reference_log_probs is not None, "the objective needs them"
    ratios = target_log_probs(tokens.log_probs, tokens.targets) - tokens.reference_log_probs
    return per_sequence(ratios, tokens.rows, len(sequences.weights))
