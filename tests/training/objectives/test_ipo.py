"""IPO against hand-computed numbers and TRL's formula."""

from __future__ import annotations

import pytest
import torch

from tests.training.objectives.test_dpo import batch
from training.objectives import IPO
from training.objectives.ipo import ipo
from training.objectives.pairs import log_ratios, paired

T = torch.tensor


def test_by_hand() -> None:
    # Margins 0.5 and -1 with tau 0.5, target 1: 0.25 + 2 * 4.
    loss = ipo(T([0.25, -1.0]), T([-0.25, 0.0]), T([1.0, 2.0]), tau=0.5)
    assert float(loss.total) == pytest.approx(0.25 + 8.0)
    assert float(loss.parts["accuracy"]) == 1


def test_policy_that_is_its_reference() -> None:
    """The published code divides 0 by 0 here."""
    tokens, rows, logits = batch()
    same = tokens.log_probs.gather(-1, tokens.targets[:, None])[:, 0].detach()
    rows = rows._replace(counted=torch.bincount(tokens.rows, minlength=8))
    loss = IPO(tau=0.1).loss(tokens._replace(reference_log_probs=same), rows, {}).total
    (gradient,) = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) == pytest.approx(4 * 25.0)  # four pairs, 1 / (2 * 0.1) squared each
    assert torch.isfinite(gradient).all() and gradient.abs().sum() > 0


def test_ratios_are_means_over_tokens() -> None:
    """TRL's loss for `loss_type="ipo"`, written out: sums over the completion's tokens, divided by their number."""
    tokens, rows, _ = batch()
    rows = rows._replace(counted=torch.bincount(tokens.rows, minlength=8))
    loss = IPO(tau=0.3).loss(tokens, rows, {}).total
    sums, (chosen, rejected) = log_ratios(tokens, rows).tolist(), paired(rows)
    expected = sum(
        (sums[a] / float(rows.counted[a]) - sums[b] / float(rows.counted[b]) - 1 / 0.6) ** 2
        for a, b in zip(chosen.tolist(), rejected.tolist(), strict=True)
    )
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)
