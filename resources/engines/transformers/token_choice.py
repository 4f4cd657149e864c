"""Choosing the next token of every row of a batch: pure functions of logits and uniform numbers.

A completion has its own stream of uniform numbers, keyed by its seed; its k-th token is the inverse
CDF of the k-th number. So a sample does not depend on the batch it was drawn in, on its neighbours, or
on how many rows are still alive, up to the rounding of the logits: a batch of another shape may
round them differently in the last digits, and where a number falls within that distance of a
boundary, another token is chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

CANDIDATES = 128  # highest scores tried for top_p before the whole vocabulary is sorted


def uniforms(seeds: Sequence[int], count: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 (len(seeds), count): row i is Philox4x64 under seeds[i].

    The generator is counter-based (Salmon et al. 2011, "Parallel random numbers: as easy as
    1, 2, 3"), so a row's first numbers are the same whatever ``count`` is.
    """
    rows = np.empty((len(seeds), count))
    for row, seed in zip(rows, seeds, strict=True):
        np.random.Generator(np.random.Philox(key=seed)).random(out=row)
    return torch.from_numpy(rows)


def truncate(scores: Tensor, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Scores (rows, vocabulary), already divided by the temperature, with -inf for tokens that are cut.

    top_k keeps the k highest. top_p (Holtzman et al. 2020, "nucleus") keeps, of the rest, the
    smallest set of most likely tokens whose mass is at least top_p. Ties with the last one kept
    are kept, so that the result does not depend on the order of a sort.
    """
    if 0 < top_k < scores.shape[-1]:
        ranked = scores.topk(top_k).values
        if top_p < 1:
            floor = _nucleus_floor(ranked, ranked.logsumexp(-1, keepdim=True), top_p)
        else:
            floor = ranked[:, -1:]
    elif top_p < 1:
        total = scores.logsumexp(-1, keepdim=True)
        ranked = scores.topk(min(CANDIDATES, scores.shape[-1])).values
        floor = _nucleus_floor(ranked, total, top_p)
        # A flat distribution has its nucleus outside the candidates: only those rows are sorted.
        flat = ((ranked - total).exp().sum(-1) < top_p).nonzero().squeeze(-1)
        if len(flat):
            ranked = scores[flat].sort(descending=True).values
            floor[flat] = _nucleus_floor(ranked, total[flat], top_p)
    else:
        return scores
    return scores.masked_fill(scores < floor, -torch.inf)


def _nucleus_floor(ranked: Tensor, total: Tensor, top_p: float) -> Tensor:
    """The lowest score kept (rows, 1); ``ranked`` is descending, ``total`` the log of the total mass."""
    mass = (ranked - total).exp()
    before = mass.cumsum(-1) - mass
    kept = (before < top_p).sum(-1, keepdim=True).clamp(min=1)
    return ranked.gather(-1, kept - 1)


def draw(scores: Tensor, numbers: Tensor) -> Tensor:
    """Token ids (rows,) with probability softmax(scores): the inverse CDF at ``numbers`` (rows,).

    The CDF is in vocabulary order. A token with score -inf is never drawn.
    """
    mass = (scores - scores.amax(-1, keepdim=True)).exp_()
    # CPU sums in double and rounds; a GPU's parallel sum must be double to be monotone enough.
    cdf = mass.cumsum(-1, dtype=torch.float64 if mass.is_cuda else None)
    total = cdf[:, -1:]
    # number * total may round up to the total, beyond which there is no token.
    below = torch.nextafter(total, torch.zeros_like(total))
    target = (numbers.unsqueeze(-1) * total).to(cdf.dtype).minimum(below)
    return torch.searchsorted(cdf, target, right=True).squeeze(-1)
