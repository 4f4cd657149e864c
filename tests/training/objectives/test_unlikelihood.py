"""Unlikelihood against hand-computed numbers and an independent formula in double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from training.objectives import Unlikelihood
from training.objectives.base import Sequences
from training.objectives.tokens import labelled
from training.objectives.unlikelihood import unlikelihood

T = torch.tensor


def test_by_hand() -> None:
    # Probabilities 1/2 and 1/4; the second token is marked: log 2 + 0.5 * -log(3/4).
    loss = unlikelihood(T([0.5, 0.25]).log(), T([1.0, 0.0]), T([1.0, 1.0]), alpha=0.5)
    assert float(loss.total) == pytest.approx(math.log(2) + 0.5 * math.log(4 / 3))
    assert float(loss.parts["marked"]) == 1
    assert float(loss.parts["marked_probability"]) == pytest.approx(0.25)


def test_soft_mixture_by_hand() -> None:
    # A token of probability 1/2 and score 0.25: 0.75 * log 2 + 0.25 * log 2.
    loss = unlikelihood(T([0.5]).log(), T([0.75]), T([2.0]), alpha=1.0)
    assert float(loss.total) == pytest.approx(2 * math.log(2))


def sequences(weights: list[float], counted: list[int]) -> Sequences:
    unknown = torch.full((len(weights),), math.nan)
    zeros = torch.zeros(len(weights), dtype=torch.long)
    return Sequences(T(weights), T(counted), zeros, zeros, unknown, unknown)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("objective", "aligned"),
    [
        (Unlikelihood(), lambda s: s <= 0),  # 0 is a threshold, not "unset"
        (Unlikelihood(threshold=0.5), lambda s: s <= 0.5),
        (Unlikelihood(mode="soft", alpha=0.3), lambda s: 1 - s),
    ],
)
def test_modes_and_weights(objective: Unlikelihood, aligned: object, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(2, 5, 7, generator=generator) * 3).to(dtype)
    labels = T([[-100, 3, 4, -100, -100], [-100, -100, 1, 2, 6]])
    scores = T([0.0, 0.5, 1.0, 0.0, 0.25])
    rows = sequences([2.0, 0.5], [2, 3])
    tokens = labelled(logits, labels)._replace(scores=scores)
    loss = objective.loss(tokens, rows, {}).total / objective.mass(rows)

    wide = logits.double().numpy()
    p = np.exp(wide) / np.exp(wide).sum(-1, keepdims=True)
    at = [(0, 0, 3), (0, 1, 4), (1, 1, 1), (1, 2, 2), (1, 3, 6)]
    expected = 0.0
    for (row, place, token), score in zip(at, scores.tolist(), strict=True):
        a, chosen = float(aligned(score)), p[row, place, token]  # type: ignore[operator]
        loss_of_token = -a * np.log(chosen) - objective.alpha * (1 - a) * np.log(max(1 - chosen, 1e-20))
        expected += [2.0, 0.5][row] * loss_of_token
    assert float(loss) == pytest.approx(expected / (2 * 2.0 + 3 * 0.5), rel=1e-5)


def test_certain_tokens_give_no_nan() -> None:
    logits = T([[[200.0, 0.0], [0.0, 200.0], [0.0, 0.0]]], requires_grad=True)
    tokens = labelled(logits, T([[-100, 0, 0]]))._replace(scores=T([1.0, 1.0]))
    objective, rows = Unlikelihood(), sequences([1.0], [2])
    loss = objective.loss(tokens, rows, {}).total
    loss.backward()
    # The first is certain: log(1e-20) at the floor. The second is impossible: no loss.
    assert float(loss) == pytest.approx(-math.log(1e-20), rel=1e-6)
    assert logits.grad is not None and torch.isfinite(logits.grad).all()


def test_a_marked_token_becomes_less_likely() -> None:
    logits = torch.zeros(1, 2, 3, requires_grad=True)
    objective, rows = Unlikelihood(), sequences([1.0], [1])
    tokens = labelled(logits, T([[-100, 1]]))._replace(scores=T([1.0]))
    objective.loss(tokens, rows, {}).total.backward()
    assert logits.grad is not None
    assert logits.grad[0, 0, 1] > 0 > logits.grad[0, 0, 0]
