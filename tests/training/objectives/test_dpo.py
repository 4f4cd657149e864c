"""DPO and cDPO against hand-computed numbers, TRL and the definition of a weight."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from tests.training.tiny import make_model, make_tokenizer
from training.forward import labelled_tokens
from training.objectives import DPO
from training.objectives.base import CHOSEN, REJECTED, Sequences
from training.objectives.dpo import dpo
from training.objectives.pairs import paired
from training.objectives.tokens import Tokens, labelled, target_log_probs

LOG = torch.tensor


def sequences(roles: list[int], groups: list[int], weights: list[float] | None = None) -> Sequences:
    size = len(roles)
    unknown = torch.full((size,), math.nan)
    return Sequences(
        torch.tensor(weights or [1.0] * size),
        torch.ones(size, dtype=torch.long),
        torch.tensor(roles),
        torch.tensor(groups),
        unknown,
        unknown,
    )


def batch(pairs: int = 4, seed: int = 0) -> tuple[Tokens, Sequences, torch.Tensor]:
    """Rows of different lengths: rejected ones first, pairs not side by side."""
    generator = torch.Generator().manual_seed(seed)
    rows, time, vocabulary = 2 * pairs, 7, 11
    logits = torch.randn(rows, time, vocabulary, generator=generator, requires_grad=True)
    labels = torch.randint(vocabulary, (rows, time), generator=generator)
    for row in range(rows):
        labels[row, : 1 + row % 3] = -100
        labels[row, 4 + row % 3 :] = -100
    tokens = labelled(logits, labels)
    reference = torch.log_softmax(torch.randn(len(tokens.targets), vocabulary, generator=generator), -1)
    roles = [REJECTED] * pairs + [CHOSEN] * pairs
    groups = [*range(pairs), *reversed(range(pairs))]
    known = reference.gather(-1, tokens.targets[:, None])[:, 0]
    return tokens._replace(reference_log_probs=known), sequences(roles, groups), logits


def test_by_hand() -> None:
    # A margin of 2 and one of -1, beta 0.5: -log sigmoid(1) and -log sigmoid(-0.5).
    loss = dpo(LOG([3.0, 0.0]), LOG([1.0, 1.0]), LOG([1.0, 1.0]), beta=0.5)
    assert float(loss.total) == pytest.approx(0.3132617 + 0.9740770)
    assert float(loss.parts["margin"]) == pytest.approx(0.5 * (2 - 1))
    assert float(loss.parts["accuracy"]) == 1


def test_label_smoothing_by_hand() -> None:
    loss = dpo(LOG([2.0]), LOG([0.0]), LOG([1.0]), beta=0.5, label_smoothing=0.2)
    assert float(loss.total) == pytest.approx(0.8 * 0.3132617 + 0.2 * 1.3132617)


def test_loss_is_log_2_where_the_policy_is_its_reference() -> None:
    tokens, rows, _ = batch()
    same = tokens._replace(
        reference_log_probs=tokens.log_probs.gather(-1, tokens.targets[:, None])[:, 0].detach()
    )
    loss = DPO().loss(same, rows, {})
    assert float(loss.total) / float(DPO().mass(rows)) == pytest.approx(math.log(2))
    assert torch.isfinite(loss.total)


def test_large_margins_do_not_overflow() -> None:
    loss = dpo(LOG([-1e4, 1e4]), LOG([1e4, -1e4]), LOG([1.0, 1.0]), beta=1.0)
    assert float(loss.total) == pytest.approx(2e4)


def test_pairs_are_found_by_their_group() -> None:
    chosen, rejected = paired(sequences([REJECTED, CHOSEN, CHOSEN, REJECTED], [7, 3, 7, 3]))
    assert list(zip(chosen.tolist(), rejected.tolist(), strict=True)) == [(1, 3), (2, 0)]


def test_weight_2_counts_a_pair_twice_and_0_drops_it() -> None:
    def loss(weights: list[float]) -> float:
        margins = LOG([1.0, -2.0])
        return float(dpo(margins, torch.zeros(2), LOG(weights), beta=0.3).total)

    first, second = loss([1.0, 0.0]), loss([0.0, 1.0])
    assert loss([2.0, 1.0]) == pytest.approx(2 * first + second)
    rows = sequences([CHOSEN, REJECTED, CHOSEN, REJECTED], [0, 0, 1, 1], [2.0, 2.0, 0.0, 0.0])
    assert float(DPO().mass(rows)) == 2.0


def test_loss_and_gradients_match_trl(tmp_path: Path) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    tokenizer = make_tokenizer()
    model, reference = (make_model(len(tokenizer), seed=seed).eval() for seed in (0, 1))
    texts = [("def f(a, b):", " return a + b\n", " x = [1]\n"), ("x =", " 1", " [1, 2, 3]\n y")]
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in texts]
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=reference,
        args=trl.DPOConfig(
            output_dir=str(tmp_path), beta=0.3, report_to="none", use_cpu=True, per_device_train_batch_size=2,
            bf16=False, gradient_checkpointing=False, disable_dropout=True,
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tokenizer,
    )  # fmt: skip
    inputs = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(model, inputs)
    theirs.backward()
    their_gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    # The rows of TRL's batch, chosen ones first, evaluated by our own forward pass.
    model.zero_grad()
    labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
    batch = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "labels": labels}
    batch["keep"] = labels.shape[1]
    tokens = labelled_tokens(model, batch, "")
    with torch.no_grad():
        reference_tokens = labelled_tokens(reference, batch, "")
    tokens = tokens._replace(
        reference_log_probs=target_log_probs(reference_tokens.log_probs, reference_tokens.targets)
    )
    rows_of = sequences([CHOSEN, CHOSEN, REJECTED, REJECTED], [0, 1, 0, 1])
    objective = DPO(beta=0.3)
    ours = objective.loss(tokens, rows_of, {}).total / objective.mass(rows_of)
    ours.backward()
    assert float(ours) == pytest.approx(float(theirs), abs=1e-5)
    for name, parameter in model.named_parameters():
        if name in their_gradients:
            assert parameter.grad is not None
            assert torch.allclose(parameter.grad, their_gradients[name], atol=1e-5), name
