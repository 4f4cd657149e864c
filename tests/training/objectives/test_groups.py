"""GRPO and RLOO against hand-computed numbers, TRL's arithmetic, and the definition of a weight."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.training.objectives.test_dpo import sequences
from training.objectives import GRPO, RLOO
from training.objectives.base import MEMBER, Sequences
from training.objectives.groups import clipped_gain
from training.objectives.grpo import advantages, grpo
from training.objectives.rloo import left_out, rloo
from training.objectives.tokens import Tokens

T = torch.tensor


def members(groups: list[int], rewards: list[float], weights: list[float] | None = None) -> Sequences:
    return sequences([MEMBER] * len(groups), groups, weights)._replace(rewards=T(rewards))


def batch(seqs: Sequences, seed: int = 0, vocabulary: int = 7) -> tuple[Tokens, Sequences, torch.Tensor]:
    """Texts of 1, 2, 3, … tokens; sampled by another policy."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.arange(1, 1 + len(seqs.weights))
    rows = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    targets = torch.randint(vocabulary, (len(rows),), generator=generator)
    logits = torch.randn(len(rows), vocabulary, generator=generator).requires_grad_()
    log_probs = logits.log_softmax(-1)
    picked = log_probs.detach().gather(-1, targets[:, None])[:, 0]
    known = picked + 0.3 * torch.randn(len(rows), generator=generator)
    sampled = torch.zeros(len(lengths)).index_add(0, rows, known)
    sampled_seqs = seqs._replace(counted=lengths, sampled_log_probs=sampled)
    return Tokens(log_probs, targets, rows, reference_log_probs=known), sampled_seqs, logits


def test_advantages_by_hand() -> None:
    """Rewards 1, 2, 6: mean 3, unbiased standard deviation √7. Left out: 1 − 4, 2 − 3.5, 6 − 1.5."""
    seqs = members([0, 1, 0, 0], [1.0, 9.0, 2.0, 6.0])
    spread = math.sqrt(7) + 1e-4
    expected = [-2 / spread, 0.0, -1 / spread, 3 / spread]
    assert advantages(seqs.rewards, seqs, scale=True).tolist() == pytest.approx(expected)
    assert advantages(seqs.rewards, seqs, scale=False).tolist() == pytest.approx([-2, 0, -1, 3])
    assert left_out(seqs.rewards, seqs).tolist() == pytest.approx([-3, 0, -1.5, 4.5])


def test_equal_rewards_and_single_sequences_give_no_gradient() -> None:
    for seqs in (members([0, 0, 0], [2.0, 2.0, 2.0]), members([-1, -1, 3], [1.0, 2.0, 3.0])):
        tokens, seqs, logits = batch(seqs)
        for objective in (GRPO(), RLOO(kl_coef=0.0)):
            (gradient,) = torch.autograd.grad(
                objective.loss(tokens, seqs, {}).total, [logits], retain_graph=True
            )
            assert torch.equal(gradient, torch.zeros_like(gradient))


def test_clipping_by_hand() -> None:
    gain = clipped_gain(T([1.5, 1.5, 0.5, 0.5]), T([1.0, -1.0, 1.0, -1.0]), 0.2)
    assert gain.tolist() == pytest.approx([1.2, -1.5, 0.5, -0.8])


def test_grpo_by_hand() -> None:
    """One text of two tokens, ratios 1.5 and 1, advantage 2, β 0.1."""
    seqs = members([-1], [0.0])._replace(counted=T([2]))
    gaps = T([math.log(1.5), 0.0])
    loss = grpo(gaps - 1, T([-1.0, -1.0]), T([2.0]), T([0, 0]), seqs, epsilon=0.2, kl_coef=0.1)
    kl = (1 / 1.5 + math.log(1.5) - 1) / 2
    assert float(loss.total) == pytest.approx(-(2.4 + 2.0) / 2 + 0.1 * kl)
    assert float(loss.parts["kl"]) == pytest.approx(kl) and float(loss.parts["clipped share"]) == 0.5


def test_grpo_matches_trl() -> None:
    """TRL's arithmetic for `loss_type="grpo"`, on padded matrices, with its own names."""
    rewards = [1.0, 3.0, 2.0, 0.0, 0.0, 5.0]
    tokens, seqs, logits = batch(members([0, 0, 0, 1, 1, 1], rewards))
    ours = GRPO(kl_coef=0.05).loss(tokens, seqs, {}).total / GRPO().mass(seqs)
    shape = (6, 6)
    mask, per_token_logps, old_per_token_logps = (torch.zeros(shape) for _ in range(3))
    values = tokens.log_probs.gather(-1, tokens.targets[:, None])[:, 0]
    at = torch.cat([torch.arange(n) for n in range(1, 7)])
    assert tokens.reference_log_probs is not None
    mask[tokens.rows, at] = 1.0
    per_token_logps = per_token_logps.index_put((tokens.rows, at), values)
    old_per_token_logps[tokens.rows, at] = tokens.reference_log_probs
    grouped = T(rewards).view(-1, 3)
    scaled = ((grouped - grouped.mean(1, keepdim=True)) / (grouped.std(1, keepdim=True) + 1e-4)).flatten()
    coef_1 = torch.exp(per_token_logps - old_per_token_logps)
    coef_2 = torch.clamp(coef_1, 1 - 0.2, 1 + 0.2)
    per_token_loss = -torch.min(coef_1 * scaled[:, None], coef_2 * scaled[:, None])
    gap = old_per_token_logps - per_token_logps
    per_token_loss = per_token_loss + 0.05 * (torch.exp(gap) - gap - 1)
    theirs = ((per_token_loss * mask).sum(-1) / mask.sum(-1)).mean()
    assert float(ours.detach()) == pytest.approx(float(theirs.detach()), abs=1e-5)
    mine, other = (torch.autograd.grad(loss, [logits], retain_graph=True)[0] for loss in (ours, theirs))
    assert torch.allclose(mine, other, atol=1e-6)


def test_rloo_by_hand() -> None:
    """Ratios 1 and e^0.5 (clipped at 1.2), advantages 1 and 2."""
    loss = rloo(T([-3.0, -2.5]), T([-3.0, -3.0]), T([1.0, 2.0]), T([1.0, 2.0]), epsilon=0.2)
    assert float(loss.total) == pytest.approx(-(1 + 2 * 2.4))


def test_rloo_on_policy_is_reinforce() -> None:
    tokens, seqs, logits = batch(members([0, 0, 0], [1.0, 2.0, 6.0]))
    values = tokens.log_probs.gather(-1, tokens.targets[:, None])[:, 0]
    sums = torch.zeros(3).index_add(0, tokens.rows, values)
    on_policy = seqs._replace(sampled_log_probs=sums.detach())
    (ours,) = torch.autograd.grad(
        RLOO(kl_coef=0.0).loss(tokens, on_policy, {}).total, [logits], retain_graph=True
    )
    (reinforce,) = torch.autograd.grad(-(T([-3.0, -1.5, 4.5]) * sums).sum(), [logits])
    assert torch.allclose(ours, reinforce, atol=1e-5)


def test_kl_to_the_reference_lowers_the_reward() -> None:
    """log π_old − log π_ref is 1 and 3: rewards 2 − 0.5 and 2 − 1.5."""
    seqs = members([0, 0], [2.0, 2.0])._replace(sampled_log_probs=T([-2.0, -1.0]))
    log_probs = torch.full((2, 2), 0.5).log()
    tokens = Tokens(log_probs, T([0, 1]), T([0, 1]), reference_log_probs=T([-3.0, -4.0]))
    loss = RLOO(kl_coef=0.5, epsilon=100.0).loss(tokens, seqs, {}).total
    ratios = [0.5 / math.exp(-2.0), 0.5 / math.exp(-1.0)]
    assert float(loss) == pytest.approx(-(1.0 * ratios[0] - 1.0 * ratios[1]), rel=1e-5)


@pytest.mark.parametrize("objective", [GRPO(kl_coef=0.1), RLOO(kl_coef=0.1)])
def test_weight_2_counts_a_sequence_twice_and_0_drops_it(objective: Any) -> None:
    def loss(places: list[int], weights: list[float]) -> float:
        tokens, seqs, _ = batch(members([0, 0, 0], [1.0, 2.0, 6.0]))
        rows, take = [], []
        for new, old in enumerate(places):
            own = (tokens.rows == old).nonzero()[:, 0]
            take.append(own)
            rows.append(torch.full((len(own),), new))
        at = torch.cat(take)
        known = tokens.reference_log_probs
        assert known is not None
        chosen = Tokens(
            tokens.log_probs[at], tokens.targets[at], torch.cat(rows), reference_log_probs=known[at]
        )
        theirs = Sequences(*(part[places] for part in seqs))._replace(weights=T(weights))
        return float(objective.loss(chosen, theirs, {}).total / objective.mass(theirs))

    assert loss([0, 1, 2], [1, 2, 1]) == pytest.approx(loss([0, 1, 1, 2], [1, 1, 1, 1]), abs=1e-5)
    assert loss([0, 1, 2], [1, 0, 1]) == pytest.approx(loss([0, 2], [1, 1]), abs=1e-5)
