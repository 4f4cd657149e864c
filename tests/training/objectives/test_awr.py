"""Advantage-weighted regression against hand-computed numbers and an independent formula in double precision."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from tests.training.objectives.test_unlikelihood import sequences
from training.objectives import AWR
from training.objectives.awr import awr
from training.objectives.base import Step
from training.objectives.tokens import labelled

T = torch.tensor


def test_by_hand() -> None:
    """Rewards 0 and -1, value -1/2 for both, β 1: weights e^0.5 and e^-0.5; the values are off by 1/2 each."""
    values = T([-0.5, -0.5], requires_grad=True)
    log_probs = T([0.5, 0.25]).log().requires_grad_()
    loss = awr(log_probs, T([0.0, -1.0]), values, T([1.0, 2.0]), alpha=0.25, beta=1.0, highest=1000.0)
    likelihood = math.exp(0.5) * math.log(2) + 2 * math.exp(-0.5) * math.log(4)
    assert loss.total.item() == pytest.approx(0.25 * likelihood + 0.75 * (0.25 + 2 * 0.25))
    loss.total.backward()
    # No gradient flows through the advantage: the values' gradient comes from the squared errors alone.
    assert values.grad is not None and values.grad.tolist() == pytest.approx(
        [0.75 * 2 * -0.5, 0.75 * 2 * 2 * 0.5]
    )
    assert log_probs.grad is not None and log_probs.grad[0].item() == pytest.approx(-0.25 * math.exp(0.5))


def test_reward_weighted_regression_without_a_value_head() -> None:
    """The released code subtracts a value head that stays at -1/2, which scales this loss by e^(1/2β)."""
    log_probs, rewards, ones = T([0.5, 0.25]).log(), T([0.0, -3.0]), T([1.0, 1.0])
    plain = awr(log_probs, rewards, None, ones, alpha=1.0, beta=2.0, highest=1000.0)
    assert plain.total.item() == pytest.approx(math.log(2) + math.exp(-1.5) * math.log(4))
    half = awr(log_probs, rewards, T([-0.5, -0.5]), ones, alpha=1.0, beta=2.0, highest=1000.0)
    assert half.total.item() == pytest.approx(plain.total.item() * math.exp(0.25))


def test_weights_are_clipped() -> None:
    loss = awr(T([-1.0]), T([5.0]), None, T([1.0]), alpha=1.0, beta=0.1, highest=20.0)
    assert loss.total.item() == 20.0


def test_scores_are_negative_rewards_and_weights_count() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator) * 3
    labels = T([[-100, 3, 4, -100, -100], [-100, -100, 1, 2, 6]])
    scores, values = T([0.0, 0.5, 1.0, 0.0, 0.25]), T([-0.5, -0.1, -0.9, -0.2, -0.3])
    rows, objective = sequences([2.0, 0.5], [2, 3]), AWR(alpha=0.7, beta=0.3)
    tokens = labelled(logits, labels)._replace(scores=scores, values=values)
    loss = objective.loss(tokens, rows, {}).total / objective.mass(rows)
    p = np.exp(logits.double().numpy())
    p /= p.sum(-1, keepdims=True)
    at = [(0, 0, 3), (0, 1, 4), (1, 1, 1), (1, 2, 2), (1, 3, 6)]
    expected = 0.0
    for (row, position, token), s, v in zip(at, scores.tolist(), values.tolist(), strict=True):
        weight = math.exp((-s - v) / 0.3)
        each = -0.7 * weight * math.log(p[row, position, token]) + 0.3 * (-s - v) ** 2
        expected += (2.0 if row == 0 else 0.5) * each
    assert loss.item() == pytest.approx(expected / (2.0 * 2 + 0.5 * 3), rel=1e-5)


def test_reported_figures() -> None:
    """Rewards 0, -1, -2 and values half of them: perfectly correlated."""
    rewards = T([0.0, -1.0, -2.0])
    loss = awr(T([-1.0] * 3), rewards, rewards / 2, T([1.0] * 3), alpha=0.5, beta=1.0, highest=1e3)
    sums = {name: part.item() for name, part in loss.parts.items()}
    _, figures = AWR().adapt({}, sums, Step(3.0, 3.0, 3.0))
    assert figures["mean reward"] == -1 and figures["mean value"] == -0.5
    assert figures["value loss"] == pytest.approx((0 + 0.25 + 1) / 3)
    assert figures["correlation of value and reward"] == pytest.approx(1.0, abs=1e-6)


def test_contradictory_settings() -> None:
    assert AWR().needs == {"token scores", "value head"}
    assert AWR(alpha=1.0, value_head=False).needs == {"token scores"}
    with pytest.raises(ValidationError, match="without a value head there is no value to learn"):
        AWR(value_head=False)
    with pytest.raises(ValidationError, match="leaves the value head untrained"):
        AWR(alpha=1.0)
