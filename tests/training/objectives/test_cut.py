"""CUT against an independent implementation of the published formulas, and hand-computed numbers."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.training.objectives.test_dpo import sequences
from training.objectives import CUT
from training.objectives.base import Sequences
from training.objectives.cut import cut
from training.objectives.tokens import Tokens

V = 7


def batch(
    kinds: str, seed: int = 0, scale: float = 2.0, weights: list[float] | None = None
) -> tuple[Tokens, Sequences, torch.Tensor, torch.Tensor, list[int]]:
    """Texts of 1, 2, 3, … tokens, with a judgment (``n``) or without (``p``), and logits of both contexts."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1 + i for i in range(len(kinds))]
    rows = torch.repeat_interleave(torch.arange(len(kinds)), torch.tensor(lengths))
    targets = torch.randint(V, (len(rows),), generator=generator)
    places = torch.tensor([i for i, row in enumerate(rows.tolist()) if kinds[row] == "n"], dtype=torch.long)
    first = (scale * torch.randn(len(rows), V, generator=generator)).requires_grad_()
    second = (scale * torch.randn(len(places), V, generator=generator)).requires_grad_()
    tokens = Tokens(first.log_softmax(-1), targets, rows, second=second.log_softmax(-1), second_places=places)
    seqs = sequences([0] * len(kinds), [-1] * len(kinds), weights)._replace(counted=torch.tensor(lengths))
    return tokens, seqs, first, second, lengths


def published(
    kinds: str,
    lengths: list[int],
    targets: torch.Tensor,
    first: torch.Tensor,
    second: torch.Tensor,
    weights: list[float],
    *,
    threshold: float,
    alpha: float,
    gamma: float,
    halved: bool,
) -> Any:
    """Text by text and token by token, in probabilities, as the paper writes it."""
    total, at, judged_at = torch.zeros(()), 0, 0
    for kind, length, weight in zip(kinds, lengths, weights, strict=True):
        like, unlike = torch.zeros(()), torch.zeros(())
        for _ in range(length):
            target = int(targets[at])
            p = torch.softmax(first[at], -1)[target]
            like = like - torch.log(p) / length
            if kind == "n":
                q = torch.softmax(second[judged_at], -1)[target]
                if float(p) / float(q) > threshold:
                    unlike = unlike - alpha * float(p) ** gamma * torch.log(1 - q) / length
                else:
                    unlike = unlike - torch.log(q) / length
                judged_at += 1
            at += 1
        each = like if kind == "p" else (like + unlike) / (2 if halved else 1)
        total = total + weight * each
    return total


@pytest.mark.parametrize("kinds", ["nnnn", "ppp", "pnpnn"])
@pytest.mark.parametrize("threshold", [0.5, 1.0, 1.1])
@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("combine", ["mean", "sum"])
def test_loss_and_gradients_match_the_paper(kinds: str, threshold: float, gamma: float, combine: str) -> None:
    weights = [1.0, 2.0, 0.0, 1.0, 0.5][: len(kinds)]
    tokens, seqs, first, second, lengths = batch(kinds, weights=weights)
    objective = CUT(threshold=threshold, weight=0.7, gamma=gamma, combine=combine)  # type: ignore[arg-type]
    ours = objective.loss(tokens, seqs, {}).total
    theirs = published(
        kinds, lengths, tokens.targets, first, second, weights,
        threshold=threshold, alpha=0.7, gamma=gamma, halved=combine == "mean",
    )  # fmt: skip
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-5)
    assert float(objective.mass(seqs)) == sum(weights)
    expected = torch.autograd.grad(theirs, [first, second], allow_unused=True)
    for mine, other in zip(torch.autograd.grad(ours, [first, second]), expected, strict=True):
        assert torch.allclose(mine, torch.zeros_like(mine) if other is None else other, atol=1e-5)


def test_by_hand() -> None:
    """Two tokens under a judgment: p 1/2 and 1/4, without it 1/4 and 1/2; the first is flagged."""
    log = torch.tensor([0.5, 0.25]).log()
    loss = cut(
        log, log.flip(0), torch.tensor([0, 1]), torch.tensor([0, 0]),
        sequences([0], [-1])._replace(counted=torch.tensor([2])),
        threshold=1.1, weight=1.0, gamma=0.0, share=0.5,
    )  # fmt: skip
    like = (math.log(2) + math.log(4)) / 2
    unlike = (-math.log(3 / 4) + math.log(2)) / 2
    assert float(loss.total) == pytest.approx((like + unlike) / 2)
    assert float(loss.parts["flagged"]) == 1 and float(loss.parts["judged"]) == 2
    figures = CUT().adapt({}, {name: float(v) for name, v in loss.parts.items()}, None)[1]  # type: ignore[arg-type]
    assert figures == {"flagged share": 0.5, "log ratio": pytest.approx(0.0)}


def test_equal_probabilities_are_not_flagged_at_a_threshold_of_1() -> None:
    log = torch.tensor([0.3]).log()
    loss = cut(
        log, log, torch.tensor([0]), torch.tensor([0]), sequences([0], [-1]),
        threshold=1.0, weight=1.0, gamma=0.0, share=1.0,
    )  # fmt: skip
    assert float(loss.parts["flagged"]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1e3])
def test_probabilities_that_round_to_0_and_1_stay_finite(dtype: torch.dtype, scale: float) -> None:
    tokens, seqs, first, second, _ = batch("nnpnn", scale=scale)
    as_read = [part.detach().to(dtype).requires_grad_() for part in (first, second)]
    log_probs = [part.float().log_softmax(-1) for part in as_read]
    tokens = tokens._replace(log_probs=log_probs[0], second=log_probs[1])
    loss = CUT(gamma=1.0).loss(tokens, seqs, {})
    gradients = torch.autograd.grad(loss.total, as_read)
    assert torch.isfinite(loss.total) and all(torch.isfinite(part).all() for part in gradients)


def test_no_gradient_flows_through_the_ratio() -> None:
    """The first context learns from its own likelihood alone: its gradient is that of the mean NLL."""
    tokens, seqs, first, _, lengths = batch("nn")
    (ours,) = torch.autograd.grad(CUT(combine="sum", gamma=2.0).loss(tokens, seqs, {}).total, [first])
    values = first.log_softmax(-1).gather(-1, tokens.targets[:, None])[:, 0]
    nll = sum(-values[tokens.rows == row].sum() / length for row, length in enumerate(lengths))
    (alone,) = torch.autograd.grad(nll, [first])
    assert torch.allclose(ours, alone, atol=1e-6)
