"""The objectives of reward models against hand-computed numbers, TRL and the definition of a weight."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.training.objectives.test_dpo import sequences
from tests.training.tiny import make_tokenizer
from training.objectives import BradleyTerry, Rating
from training.objectives.base import CHOSEN, ONLY, REJECTED
from training.objectives.bradley_terry import bradley_terry
from training.objectives.rating import rating
from training.objectives.tokens import Tokens

T = torch.tensor
NONE = Tokens(torch.zeros(0, 0), torch.zeros(0), torch.zeros(0))


def test_rating_by_hand() -> None:
    """σ(0) = 1/2 and σ(log 3) = 3/4, of ratings 1 and 1/4, the second one of weight 2."""
    loss = rating(T([0.0, math.log(3)]), T([1.0, 0.25]), T([1.0, 2.0]))
    assert float(loss.total) == pytest.approx(0.25 + 2 * 0.25)
    assert float(loss.parts["absolute error"]) == pytest.approx(0.5 + 2 * 0.5)


def test_bradley_terry_by_hand() -> None:
    loss = bradley_terry(T([1.0, 0.0]), T([0.0, 2.0]), T([1.0, 3.0]))
    assert float(loss.total) == pytest.approx(math.log1p(math.exp(-1)) + 3 * math.log1p(math.exp(2)))
    assert float(loss.parts["accuracy"]) == 1.0


def test_losses_of_extreme_outputs_are_finite() -> None:
    outputs = T([1e4, -1e4]).requires_grad_()
    for total in (
        rating(outputs, T([0.0, 1.0]), torch.ones(2)).total,
        bradley_terry(outputs[1:], outputs[:1], torch.ones(1)).total,
    ):
        (gradient,) = torch.autograd.grad(total, [outputs], retain_graph=True)
        assert torch.isfinite(total) and torch.isfinite(gradient).all()


def test_weight_2_counts_a_row_twice_and_0_drops_it() -> None:
    def mean(
        objective: Rating | BradleyTerry, roles: list[int], groups: list[int], weights: list[float]
    ) -> float:
        outputs = T(
            [0.3 + 0.5 * group + (role == REJECTED) for role, group in zip(roles, groups, strict=True)]
        )
        rows = sequences(roles, groups, weights)._replace(rewards=T([0.1 + 0.2 * group for group in groups]))
        loss = objective.loss(NONE._replace(outputs=outputs), rows, {})
        return float(loss.total / objective.mass(rows))

    assert mean(Rating(), [ONLY] * 3, [0, 1, 2], [2.0, 1.0, 0.0]) == pytest.approx(
        mean(Rating(), [ONLY] * 3, [0, 0, 1], [1.0, 1.0, 1.0])
    )
    sides = [CHOSEN, REJECTED]
    assert mean(BradleyTerry(), sides * 2, [0, 0, 1, 1], [2.0, 2.0, 0.0, 0.0]) == pytest.approx(
        mean(BradleyTerry(), sides, [0, 0], [1.0, 1.0])
    )


def test_loss_and_gradients_match_trl(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from training.forward import head_outputs

    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_labels=1, pad_token_id=1, bos_token_id=None, eos_token_id=0,
    )  # fmt: skip
    model = LlamaForSequenceClassification(config).eval()
    texts = [("def f(a, b):", " return a + b\n", " x = [1]\n"), ("x =", " 1", " [1, 2, 3]\n y")]
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in texts]
    trainer = trl.RewardTrainer(
        model=model,
        args=trl.RewardConfig(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, per_device_train_batch_size=2, bf16=False,
            gradient_checkpointing=False, disable_dropout=True,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    inputs = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(model, dict(inputs))
    theirs.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    outputs = head_outputs(model, {"input_ids": ids, "attention_mask": mask, "labels": ids})
    rows_of = sequences([CHOSEN, CHOSEN, REJECTED, REJECTED], [0, 1, 0, 1])
    ours = BradleyTerry().loss(outputs, rows_of, {}).total / BradleyTerry().mass(rows_of)
    ours.backward()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-5)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert torch.allclose(parameter.grad, expected[name], atol=1e-5), name
