"""KTO against hand-computed numbers, TRL and the definition of a weight."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.objectives.test_dpo import sequences
from tests.training.tiny import make_model, make_tokenizer
from training.forward import labelled_tokens
from training.objectives import KTO
from training.objectives.base import CHOSEN, REJECTED, Step
from training.objectives.kto import kto
from training.objectives.tokens import Tokens, target_log_probs

T = torch.tensor
PLAIN: dict[str, float] = {"beta": 0.5, "desirable_weight": 1.0, "undesirable_weight": 1.0}


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_by_hand() -> None:
    """β 0.5, z_0 1: a good text with r = 3, a bad one with r = −1, weights 1 and 2."""
    rows = sequences([CHOSEN, REJECTED], [-1, -1], [1.0, 2.0])
    loss = kto(T([3.0, -1.0]), rows, 1.0, beta=0.5, desirable_weight=1.5, undesirable_weight=0.5)
    assert float(loss.total) == pytest.approx(1.5 * (1 - sigmoid(1.0)) + 2 * 0.5 * (1 - sigmoid(1.0)))
    step = Step(mass=3.0, weight=3.0, sequences=2.0)
    _, figures = KTO().adapt({}, {name: float(part) for name, part in loss.parts.items()}, step)
    assert figures == pytest.approx({"desirable log ratio": 3.0, "undesirable log ratio": -1.0, "kl": 1.0})


def test_policy_that_is_its_reference() -> None:
    """Every log-ratio is 0, so z_0 is 0 and every loss 1/2."""
    rows = sequences([CHOSEN, REJECTED, REJECTED], [-1] * 3)
    ratios = torch.zeros(3, requires_grad=True)
    loss = kto(ratios, rows, 0.0, **PLAIN).total / KTO().mass(rows)
    loss.backward()
    assert float(loss.detach()) == 0.5
    assert ratios.grad is not None and ratios.grad.tolist() == pytest.approx(
        [-0.125 / 3, 0.125 / 3, 0.125 / 3]
    )


def test_negative_kl_estimate_counts_as_0() -> None:
    tokens = Tokens(torch.full((1, 2), 0.5).log(), T([0]), T([0]), reference_log_probs=T([-1.0]))
    rows = sequences([CHOSEN], [-1])
    losses = [float(KTO().loss(tokens, rows, {"mismatched": kl}).total) for kl in (-3.0, 0.0, 2.0)]
    assert losses[0] == losses[1] < losses[2]


def test_loss_is_finite_far_from_the_reference() -> None:
    ratios = T([1e4, -1e4, 1e4, -1e4], dtype=torch.float32).requires_grad_()
    rows = sequences([CHOSEN, CHOSEN, REJECTED, REJECTED], [-1] * 4)
    loss = kto(ratios, rows, 5.0, **PLAIN).total
    loss.backward()
    assert float(loss.detach()) == 2.0
    assert ratios.grad is not None and torch.isfinite(ratios.grad).all()


def test_weight_2_counts_a_text_twice_and_0_drops_it() -> None:
    ratios = T([1.0, -2.0, 0.5])
    roles = [CHOSEN, REJECTED, CHOSEN]

    def loss(places: list[int], weights: list[float]) -> tuple[float, float]:
        rows = sequences([roles[i] for i in places], [-1] * len(places), weights)
        mismatched = Tokens(
            -torch.ones(len(places), 1), torch.zeros(len(places), dtype=torch.long), torch.arange(len(places)),
            reference_log_probs=T([-1.5 - i for i in places]),
        )  # fmt: skip
        before = float(KTO().before_step(mismatched, rows)["mismatched"] / KTO().mass(rows))
        return before, float(kto(ratios[places], rows, before, **PLAIN).total / KTO().mass(rows))

    assert loss([0, 1, 2], [2.0, 1.0, 0.0]) == pytest.approx(loss([0, 0, 1], [1.0, 1.0, 1.0]))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (1.33, 0.7)])
def test_loss_and_gradients_match_trl(tmp_path: Path, weights: tuple[float, float]) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer = make_tokenizer()
    model, reference = (make_model(len(tokenizer), seed=seed).eval() for seed in (0, 1))
    texts = [("def f(a, b):", " return a + b\n", True), ("x =", " [1, 2, 3]\n y", False), ("y =", " 1", True)]
    trainer = trl.KTOTrainer(
        model=model,
        ref_model=reference,
        args=trl.KTOConfig(
            output_dir=str(tmp_path), beta=0.3, report_to="none", use_cpu=True, per_device_train_batch_size=3,
            bf16=False, gradient_checkpointing=False, disable_dropout=True,
            desirable_weight=weights[0], undesirable_weight=weights[1],
        ),
        train_dataset=datasets.Dataset.from_list(
            [{"prompt": prompt, "completion": text, "label": label} for prompt, text, label in texts]
        ),
        processing_class=tokenizer,
    )  # fmt: skip
    inputs = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(model, inputs)
    theirs.backward()
    their_gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    # The rows of TRL's batch, and its mismatched ones, evaluated by our own forward pass.
    def batch(prefix: str) -> dict[str, Any]:
        ids, mask = inputs[f"{prefix}input_ids"], inputs[f"{prefix}completion_mask"]
        labels = ids.masked_fill(mask == 0, -100)
        given = {"input_ids": ids, "attention_mask": inputs[f"{prefix}attention_mask"], "labels": labels}
        return given | {"keep": labels.shape[1], "weights": torch.ones(len(ids))}

    def with_reference(prefix: str) -> Tokens:
        with torch.no_grad():
            reference_tokens = labelled_tokens(reference, batch(prefix), "")
        known = target_log_probs(reference_tokens.log_probs, reference_tokens.targets)
        return labelled_tokens(model, batch(prefix), "")._replace(reference_log_probs=known)

    roles = [CHOSEN if label else REJECTED for label in inputs["label"].tolist()]
    rows = sequences(roles, [-1] * len(roles))
    objective = KTO(beta=0.3, desirable_weight=weights[0], undesirable_weight=weights[1])
    with torch.no_grad():
        before = objective.before_step(with_reference("KL_"), rows)["mismatched"] / objective.mass(rows)
    ours = objective.loss(with_reference(""), rows, {"mismatched": float(before)}).total / objective.mass(
        rows
    )
    ours.backward()
    assert float(ours) == pytest.approx(float(theirs), abs=1e-5)
    assert float(before) > 0  # otherwise the KL was not compared
    for name, parameter in model.named_parameters():
        if name in their_gradients:
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, their_gradients[name], atol=1e-5), name
