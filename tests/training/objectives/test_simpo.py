"""SimPO against hand-computed numbers and TRL."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.training.objectives.test_dpo import batch
from training.objectives import SimPO
from training.objectives.pairs import paired
from training.objectives.simpo import simpo
from training.objectives.tokens import sequence_log_probs

T = torch.tensor


def test_by_hand() -> None:
    # Margins 2 * 0.5 - 1 = 0 and 2 * -1 - 1 = -3: log 2, and twice log(1 + e^3).
    loss = simpo(T([-1.0, -2.0]), T([-1.5, -1.0]), T([1.0, 2.0]), beta=2.0, gamma=1.0)
    assert float(loss.total) == pytest.approx(0.6931472 + 2 * 3.0485873)
    assert float(loss.parts["accuracy"]) == 1 and float(loss.parts["margin"]) == pytest.approx(1 - 4)


def test_loss_matches_trl() -> None:
    cpo = pytest.importorskip("trl.experimental.cpo")
    tokens, rows, _ = batch()
    rows = rows._replace(counted=torch.bincount(tokens.rows, minlength=8))
    means, (chosen, rejected) = sequence_log_probs(tokens, 8) / rows.counted, paired(rows)
    settings = SimpleNamespace(
        beta=2.0, simpo_gamma=1.0, loss_type="simpo", label_smoothing=0.0, alpha=0.0, cpo_alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    theirs, *_ = cpo.CPOTrainer.cpo_loss(settings, means[chosen], means[rejected])
    ours = SimPO(beta=2.0, gamma=1.0).loss(tokens, rows, {}).total / 4
    assert float(ours.detach()) == pytest.approx(float(theirs.mean().detach()), abs=1e-5)
