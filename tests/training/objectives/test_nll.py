"""Objectives against hand arithmetic, independent computations, finite differences and reference implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence
from transformers import GPT2Config, GPT2LMHeadModel

from training.objectives.nll import conditional_mle
from training.objectives.tokens import (
    IGNORE,
    entropy,
    kl,
    labelled,
    restrict,
    target_log_probs,
    token_weights,
)

DIRECTIONS = ("reference_to_policy", "policy_to_reference")


def random_batch(
    seed: int = 0, batch: int = 3, time: int = 5, vocabulary: int = 7
) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, time, vocabulary, generator=generator, dtype=torch.float64) * 2
    labels = torch.randint(vocabulary, (batch, time), generator=generator)
    labels[torch.rand(batch, time, generator=generator) < 0.4] = IGNORE
    labels[:, 0] = IGNORE
    labels[0, 1] = 3
    weights = torch.rand(batch, generator=generator, dtype=torch.float64) + 0.1
    reference = torch.randn(batch, time, vocabulary, generator=generator, dtype=torch.float64)
    return logits, labels, weights, reference


def mean_nll(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None) -> float:
    tokens = labelled(logits, labels)
    weights = torch.ones(len(labels)) if weights is None else weights
    return float(conditional_mle(tokens, weights).total / token_weights(weights, tokens).sum())


def test_nll_by_hand() -> None:
    # Two tokens with odds 3:1 and 1:1 over a vocabulary of two; the third position is masked.
    logits = torch.tensor([[[math.log(3.0), 0.0], [0.0, 0.0], [5.0, 0.0], [0.0, 0.0]]])
    labels = torch.tensor([[IGNORE, 0, 1, IGNORE]])
    tokens = labelled(logits, labels)
    log_probs = target_log_probs(tokens.log_probs, tokens.targets)
    assert log_probs.tolist() == pytest.approx([-math.log(4 / 3), -math.log(2)])
    assert mean_nll(logits, labels) == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)


def test_weights_by_hand() -> None:
    # Sample 0: one token of -log 1/2; sample 1: two tokens of -log 1/4 each.
    logits = torch.zeros(2, 3, 4)
    logits[0, 0] = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf])
    labels = torch.tensor([[IGNORE, 0, IGNORE], [IGNORE, 1, 2]])
    weights = torch.tensor([3.0, 0.5])
    expected = (3 * math.log(2) + 0.5 * 2 * math.log(4)) / (3 + 2 * 0.5)
    assert mean_nll(logits, labels, weights) == pytest.approx(expected)


def test_a_certain_token_counts() -> None:
    # log p = 0 is a value, not a mask: the mean is over both tokens.
    logits = torch.tensor([[[100.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    labels = torch.tensor([[IGNORE, 0, 1]])
    assert mean_nll(logits, labels) == pytest.approx(math.log(2) / 2)


def test_entropy_and_kl_by_hand() -> None:
    half = torch.tensor([0.5, 0.5]).log()
    quarter = torch.tensor([0.25, 0.75]).log()
    assert float(entropy(half)) == pytest.approx(math.log(2))
    forward = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    backward = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert float(kl(half, quarter, "policy_to_reference")) == pytest.approx(forward)
    assert float(kl(half, quarter, "reference_to_policy")) == pytest.approx(backward)


def test_dropped_columns_by_hand() -> None:
    # Odds 1 : 3 : 4; without the third entry 1 : 3.
    kept = restrict(torch.tensor([1 / 8, 3 / 8, 4 / 8]).log(), 2)
    assert kept.exp().tolist() == pytest.approx([0.25, 0.75])


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    direction=st.sampled_from(DIRECTIONS),
    entropy_coef=st.floats(0, 1),
    kl_coef=st.floats(0, 1),
)
def test_against_numpy_in_double_precision(
    seed: int, direction: str, entropy_coef: float, kl_coef: float
) -> None:
    logits, labels, weights, reference = random_batch(seed)
    probabilities = [_softmax(x.numpy()) for x in (logits, reference)]
    total = mass = 0.0
    for b in range(labels.shape[0]):
        for t in range(1, labels.shape[1]):
            if labels[b, t] == IGNORE:
                continue
            p, q = (x[b, t - 1] for x in probabilities)
            of, to = (p, q) if direction == "policy_to_reference" else (q, p)
            divergence = float(np.sum(of * np.log(of / to)))
            uncertainty = float(-np.sum(p * np.log(p)))
            token = -math.log(p[int(labels[b, t])]) + kl_coef * divergence - entropy_coef * uncertainty
            total += float(weights[b]) * token
            mass += float(weights[b])
    tokens = labelled(logits, labels)
    result = conditional_mle(
        tokens,
        weights,
        entropy_coef=entropy_coef,
        kl_coef=kl_coef,
        kl_direction=direction,
        reference=labelled(reference, labels).log_probs,
    )
    assert float(result.total) == pytest.approx(total, abs=1e-9)
    assert float(token_weights(weights, tokens).sum()) == pytest.approx(mass, abs=1e-12)


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_against_torch_distributions_in_single_precision(direction: str) -> None:
    logits, labels, _, reference = (x.float() if x.is_floating_point() else x for x in random_batch())
    ours, theirs = labelled(logits, labels).log_probs, labelled(reference, labels).log_probs
    p, q = Categorical(logits=ours.double()), Categorical(logits=theirs.double())
    expected = kl_divergence(p, q) if direction == "policy_to_reference" else kl_divergence(q, p)
    assert torch.allclose(kl(ours, theirs, direction).double(), expected, atol=1e-6)
    assert torch.allclose(entropy(ours).double(), p.entropy(), atol=1e-6)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("columns", [7, 5])
def test_gradient_by_finite_differences(direction: str, columns: int) -> None:
    logits, labels, weights, reference = random_batch()
    fixed = labelled(reference[..., :columns], torch.where(labels == IGNORE, IGNORE, 0)).log_probs

    def objective(x: torch.Tensor) -> torch.Tensor:
        return conditional_mle(
            labelled(x, labels),
            weights,
            entropy_coef=0.3,
            kl_coef=0.7,
            kl_direction=direction,
            reference=fixed,
        ).total

    assert torch.autograd.gradcheck(objective, logits.requires_grad_(), eps=1e-6, atol=1e-7)


def gpt2(vocabulary: int) -> GPT2LMHeadModel:
    """A tiny model that computes in double precision throughout (Llama's norms do not)."""
    torch.manual_seed(vocabulary)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_positions=8,
        n_embd=8,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config).double().eval()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradient_of_the_whole_objective_with_respect_to_model_weights(direction: str) -> None:
    """Central differences in every kind of weight, through a policy with a token the reference lacks."""
    policy, reference = (gpt2(vocabulary) for vocabulary in (21, 20))
    tokens = torch.tensor([[3, 20, 7, 4, 9, 11], [3, 5, 6, 8, 2, 1]])
    labels = torch.tensor([[IGNORE, IGNORE, 7, 4, 9, IGNORE], [IGNORE, IGNORE, IGNORE, 8, 2, 1]])
    weights = torch.tensor([0.7, 1.9], dtype=torch.float64)
    with torch.no_grad():
        reference_log_probs = labelled(reference(tokens.clamp(max=19)).logits, labels).log_probs

    def objective() -> torch.Tensor:
        outputs = labelled(policy(tokens).logits, labels)
        loss = conditional_mle(
            outputs,
            weights,
            entropy_coef=0.06,
            kl_coef=0.05,
            kl_direction=direction,
            reference=reference_log_probs,
        )
        return loss.total / token_weights(weights, outputs).sum()

    objective().backward()
    generator = torch.Generator().manual_seed(0)
    for name, weight in policy.named_parameters():
        assert weight.grad is not None
        tangent = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        values = []
        for step in (1e-5, -2e-5):
            with torch.no_grad():
                weight += step * tangent
                values.append(float(objective()))
        with torch.no_grad():
            weight += 1e-5 * tangent
        slope = (values[0] - values[1]) / 2e-5
        assert float((weight.grad * tangent).sum()) == pytest.approx(slope, abs=1e-6), name


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_single_precision_over_a_large_vocabulary(direction: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, others = (torch.randn(1, 6, 50_257, generator=generator) * 3 for _ in range(2))
    labels = torch.tensor([[IGNORE, 5, 6, 7, 8, 9]])
    ours, theirs = labelled(logits, labels).log_probs, labelled(others, labels).log_probs
    p, q = (_softmax(x[0, :-1].numpy().astype(np.float64)) for x in (logits, others))
    of, to = (p, q) if direction == "policy_to_reference" else (q, p)
    divergence = np.sum(of * np.log(of / to), -1)
    # The sums have 50,000 terms, in an order that depends on the processor.
    assert kl(ours, theirs, direction).numpy() == pytest.approx(divergence, rel=1e-5)
    assert entropy(ours).numpy() == pytest.approx(-np.sum(p * np.log(p), -1), rel=3e-6)


def test_kl_against_trl() -> None:
    gkd = pytest.importorskip("trl.experimental.gkd")
    logits, labels, _, reference = (
        x.float() if x.is_floating_point() else x for x in random_batch(batch=8, time=9)
    )
    ours, theirs = labelled(logits, labels).log_probs, labelled(reference, labels).log_probs
    for direction, beta in (("reference_to_policy", 0), ("policy_to_reference", 1)):
        expected = gkd.GKDTrainer.generalized_jsd_loss(
            logits[:, :-1], reference[:, :-1], labels[:, 1:], beta=beta, reduction="sum"
        )
        assert float(kl(ours, theirs, direction).sum()) == pytest.approx(float(expected), rel=1e-6)


def test_masked_positions_have_no_gradient() -> None:
    logits, labels, weights, _ = random_batch()
    logits.requires_grad_()
    conditional_mle(labelled(logits, labels), weights, entropy_coef=0.5).total.backward()
    predicts = torch.zeros(labels.shape, dtype=torch.bool)
    predicts[:, :-1] = labels[:, 1:] != IGNORE
    assert logits.grad is not None
    assert torch.equal(logits.grad.abs().sum(-1) > 0, predicts)


def test_sums_of_micro_batches_add_up() -> None:
    logits, labels, weights, _ = random_batch(batch=4)
    whole = conditional_mle(labelled(logits, labels), weights, entropy_coef=0.1)
    parts = [
        conditional_mle(labelled(logits[i], labels[i]), weights[i], entropy_coef=0.1)
        for i in (slice(0, 1), slice(1, 4))
    ]
    assert float(sum(p.total for p in parts)) == pytest.approx(float(whole.total))


def test_against_the_transformers_loss() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    logits, labels, _, _ = (x.float() if x.is_floating_point() else x for x in random_batch(batch=8, time=9))
    expected = ForCausalLMLoss(logits, labels, vocab_size=logits.shape[-1])
    assert mean_nll(logits, labels) == pytest.approx(float(expected), abs=1e-6)


def test_against_trl() -> None:
    utils = pytest.importorskip("trl.trainer.utils")
    logits, labels, _, _ = (x.float() if x.is_floating_point() else x for x in random_batch(batch=8, time=9))
    outputs = labelled(logits, labels)
    mask = labels[:, 1:] != IGNORE
    expected = utils.selective_log_softmax(logits[:, :-1], labels[:, 1:].clamp(min=0))[mask]
    assert torch.allclose(target_log_probs(outputs.log_probs, outputs.targets), expected, atol=1e-6)
    assert torch.allclose(
        entropy(outputs.log_probs), utils.entropy_from_logits(logits[:, :-1])[mask], atol=1e-6
    )


def test_bfloat16_logits_are_computed_in_single_precision() -> None:
    logits, labels, _, _ = random_batch()
    assert labelled(logits.bfloat16(), labels).log_probs.dtype == torch.float32


def test_kl_requires_a_matching_reference() -> None:
    logits, labels, weights, _ = random_batch()
    outputs = labelled(logits, labels)
    with pytest.raises(ValueError, match="needs the reference"):
        conditional_mle(outputs, weights, kl_coef=0.1)
    with pytest.raises(ValueError, match=r"expected .* tokens"):
        conditional_mle(outputs, weights, kl_coef=0.1, reference=outputs.log_probs[1:])
