"""The decode loop and the choice of tokens, compared with transformers and with closed forms."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from resources.engines.transformers import attention, decoding
from resources.engines.transformers.decoding import NotFiniteError, Rule, sample, score
from resources.engines.transformers.token_choice import draw, truncate, uniforms
from tests.resources.engines import tiny_models

PROMPTS = [[7, 8, 9], [50, 60, 70, 80, 90, 100, 110], [5], [200, 201, 202, 203]]
KINDS = ("llama", "gpt2")


@pytest.fixture(scope="module", params=KINDS)
def model(request: pytest.FixtureRequest) -> torch.nn.Module:
    return tiny_models.model(request.param)


@pytest.fixture(scope="module")
def decoder(model: torch.nn.Module) -> torch.nn.Module:
    """The same model with the attention that the worker installs."""
    twin = tiny_models.model("llama" if "Llama" in type(model).__name__ else "gpt2")
    attention.install(twin)
    assert twin.config._attn_implementation == attention.NAME
    return twin


def rule(temperature: float = 1.0, **changes: object) -> Rule:
    options = {"top_k": 0, "top_p": 1.0, "max_new_tokens": 16, "min_new_tokens": 0,
              "end_ids": (0,), "banned_ids": (), **changes}  # fmt: skip
    return Rule(temperature=temperature, **options)


def generate(model: torch.nn.Module, prompt: Sequence[int], **options: object) -> list[int]:
    """Greedy ids from transformers for a single prompt, and so without padding."""
    ids = torch.tensor([prompt])
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)
    return out[0, len(prompt) :].tolist()


def test_greedy_ids_match_generate(model: torch.nn.Module, decoder: torch.nn.Module) -> None:
    expected = [generate(model, prompt, max_new_tokens=24) for prompt in PROMPTS]
    assert len({tuple(ids) for ids in expected}) == len(PROMPTS)
    for used in (model, decoder):
        drawn = sample(used, PROMPTS, [0, 1, 2, 3], [0] * 4, rule(0.0, max_new_tokens=24))
        assert [one.ids for one in drawn] == expected


def test_greedy_stops_where_generate_stops(model: torch.nn.Module, decoder: torch.nn.Module) -> None:
    # A token that some rows reach early serves as the end.
    free = [generate(model, prompt, max_new_tokens=24) for prompt in PROMPTS]
    end = free[0][3]
    options = {"max_new_tokens": 24, "eos_token_id": end, "pad_token_id": 1}
    for minimum in (0, 6):
        more = {"min_new_tokens": minimum} if minimum else {}
        expected = [generate(model, prompt, **options, **more) for prompt in PROMPTS]
        drawn = sample(decoder, PROMPTS, [0, 1, 2, 3], [0] * 4,
                       rule(0.0, max_new_tokens=24, min_new_tokens=minimum, end_ids=(end,)))  # fmt: skip
        assert [one.ids for one in drawn] == expected
        assert [one.ended for one in drawn] == [ids[-1] == end for ids in expected]
        assert minimum or any(one.ended for one in drawn)


def test_truncation_matches_transformers() -> None:
    torch.manual_seed(0)
    for spread in (0.2, 2.0, 6.0):
        logits = torch.randn(40, 500, dtype=torch.float64) * spread  # double: no rounding at the cutoff
        for temperature, top_k, top_p in [
            (1.0, 0, 0.9), (0.7, 0, 0.3), (1.0, 20, 1.0), (1.3, 50, 0.8), (1.0, 1, 1.0),
            (1.0, 500, 0.95), (1.0, 0, 1e-6), (1.0, 0, 0.999),
        ]:  # fmt: skip
            theirs = TemperatureLogitsWarper(temperature)(None, logits)
            if top_k:
                theirs = TopKLogitsWarper(top_k)(None, theirs)
            if top_p < 1:
                theirs = TopPLogitsWarper(top_p)(None, theirs)
            ours = truncate(logits / temperature, top_k, top_p)
            torch.testing.assert_close(ours, theirs)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-4, 4), min_size=1, max_size=12),
    st.floats(0.01, 0.99),
    st.integers(0, 13),
)
def test_truncation_in_closed_form(levels: list[int], top_p: float, top_k: int) -> None:
    scores = torch.tensor([levels], dtype=torch.float64)
    kept = truncate(scores, top_k, top_p)[0].isfinite().tolist()
    ranked = sorted(levels, reverse=True)
    pool = ranked[: top_k or None]
    mass = torch.tensor(pool, dtype=torch.float64).softmax(-1).tolist()
    needed = next(n for n in range(1, len(pool) + 1) if sum(mass[:n]) >= top_p - 1e-9)
    assert kept == [level >= ranked[needed - 1] for level in levels]  # ties are kept or dropped together


def test_uniform_numbers_depend_only_on_the_seed() -> None:
    assert torch.equal(uniforms([3, 2**64 - 1], 5), uniforms([3, 9, 2**64 - 1], 8)[[0, 2], :5])
    assert len(set(uniforms(range(100), 1).flatten().tolist())) == 100
    numbers = uniforms(range(4000), 2)  # neighbouring seeds: uniform and uncorrelated
    assert abs(numbers.mean().item() - 0.5) < 0.02
    assert abs(torch.corrcoef(numbers.T)[0, 1].item()) < 0.05
    assert abs(torch.corrcoef(torch.stack([numbers[:-1, 0], numbers[1:, 0]]))[0, 1].item()) < 0.05


def test_draw_is_the_inverse_cdf() -> None:
    scores = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).log().expand(7, 4)
    numbers = torch.tensor([0.0, 0.1999, 0.2001, 0.6999, 0.7001, 0.9999, 1 - 1e-16]).double()
    assert draw(scores, numbers).tolist() == [0, 0, 2, 2, 3, 3, 3]
    # Tokens without mass are never drawn, not even after the last one with mass.
    scores = torch.tensor([[-torch.inf, 1.0, -torch.inf, -torch.inf]])
    for number in (0.0, 0.5, 1 - 1e-16):
        assert draw(scores, torch.tensor([number]).double()).tolist() == [1]


def improbable(counts: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether chi-square over cells with expected count >= 5 (the rest pooled) exceeds its 99.99 % quantile."""
    big = expected >= 5
    seen = torch.cat([counts[big], counts[~big].sum()[None]]).double()
    predicted = torch.cat([expected[big], expected[~big].sum()[None]]).double()
    if predicted[-1] < 5:
        seen, predicted = seen[:-1], predicted[:-1]
    freedom = len(seen) - 1
    assert freedom > 10
    # Wilson and Hilferty 1931: the cube root of chi-square/n is nearly normal; 3.72 is its quantile.
    bound = freedom * (1 - 2 / (9 * freedom) + 3.72 * (2 / (9 * freedom)) ** 0.5) ** 3
    return ((seen - predicted) ** 2 / predicted).sum().item() > bound


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 30, 0.9)])
def test_frequencies_match_the_models_probabilities(
    decoder: torch.nn.Module, temperature: float, top_k: int, top_p: float
) -> None:
    prompt, count = PROMPTS[1], 6000
    drawn = sample(decoder, [prompt], [0] * count, range(count),
                   rule(temperature, top_k=top_k, top_p=top_p, max_new_tokens=2, end_ids=()))  # fmt: skip

    def probabilities(rows: list[list[int]]) -> torch.Tensor:
        with torch.inference_mode():
            scores = decoder(torch.tensor(rows)).logits[:, -1] / temperature
        return truncate(scores, top_k, top_p).softmax(-1).double()

    firsts, seconds = torch.tensor([one.ids for one in drawn]).T
    counts = torch.bincount(firsts, minlength=304)
    first = probabilities([prompt])[0]
    assert not improbable(counts, first * count)
    assert counts[first == 0].sum() == 0
    assert improbable(counts, first.roll(1) * count)  # the test detects wrong probabilities
    # Second tokens, summed over the first ones: the uniform numbers of a row are independent.
    known = counts.nonzero().squeeze(-1)
    second = probabilities([[*prompt, int(i)] for i in known])
    expected = (second * counts[known].unsqueeze(-1)).sum(0)
    assert not improbable(torch.bincount(seconds, minlength=304), expected)


def test_a_sample_does_not_depend_on_its_batch(decoder: torch.nn.Module) -> None:
    owners, seeds = [0, 0, 1, 1, 1, 2, 3], [11, 12, 13, 14, 15, 16, 11]
    together = sample(decoder, PROMPTS, owners, seeds, rule(end_ids=(0, 5, 6, 7)))
    for row, (owner, seed) in enumerate(zip(owners, seeds, strict=True)):
        alone = sample(decoder, [PROMPTS[owner]], [0], [seed], rule(end_ids=(0, 5, 6, 7)))[0]
        assert together[row].ids == alone.ids
        assert together[row].logprob == pytest.approx(alone.logprob, abs=1e-4)
    assert together[0].ids != together[6].ids  # same seed, different prompt


def test_dropping_finished_rows_changes_nothing(
    decoder: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    owners = [i % 4 for i in range(40)]
    short = rule(max_new_tokens=30, end_ids=tuple(range(40)))  # many ends, at many lengths
    results = []
    for share in (0.0, 0.5, 1.0):
        monkeypatch.setattr(decoding, "COMPACT_BELOW", share)
        results.append([one.ids for one in sample(decoder, PROMPTS, owners, range(40), short)])
    assert results[0] == results[1] == results[2]
    assert len({len(ids) for ids in results[0]}) > 5


def test_logprob_is_the_models_without_truncation(decoder: torch.nn.Module) -> None:
    constrained = rule(0.5, top_k=5, banned_ids=(9, 10), min_new_tokens=2, end_ids=tuple(range(20, 60)))
    drawn = sample(decoder, PROMPTS, [0, 1, 2, 3] * 4, range(16), constrained)
    assert any(one.ended for one in drawn)
    for index, one in enumerate(drawn):
        prompt = PROMPTS[index % 4]
        logits = decoder(torch.tensor([prompt + one.ids])).logits[0, len(prompt) - 1 : -1]
        terms = logits.log_softmax(-1)[range(len(one.ids)), one.ids]
        assert one.logprob == pytest.approx(terms.sum().item(), abs=1e-4)
    scored = score(decoder, [PROMPTS[i % 4] for i in range(16)], [one.ids for one in drawn])
    assert scored == pytest.approx([one.logprob for one in drawn], abs=1e-4)


def test_end_and_banned_tokens_are_suppressed(decoder: torch.nn.Module) -> None:
    ends = tuple(range(0, 304, 3))
    for minimum in (0, 7, 16):
        constrained = rule(min_new_tokens=minimum, end_ids=ends, banned_ids=tuple(range(1, 304, 3)))
        for one in sample(decoder, PROMPTS, [0, 1, 2, 3] * 5, range(20), constrained):
            assert len(one.ids) >= min(minimum + 1, 16)
            assert not {*one.ids[:-1]} & {*ends} and all(i % 3 != 1 for i in one.ids)
            assert one.ended == (one.ids[-1] in ends)
            assert minimum < 16 or not one.ended


def test_diverged_weights_are_reported(decoder: torch.nn.Module) -> None:
    broken = tiny_models.model("llama")
    broken.lm_head.weight.data[3] = torch.nan
    with pytest.raises(NotFiniteError, match="not finite"):
        sample(broken, PROMPTS, [0], [1], rule())
    with pytest.raises(NotFiniteError, match="not finite"):
        score(broken, [[5]], [[6, 7]])


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 30)), max_size=30), st.integers(1, 12))
def test_batches_contain_every_item_once(items: list[tuple[int, int]], limit: int) -> None:
    sizes, costs = [size for size, _ in items], [cost for _, cost in items]
    batches = list(decoding.batches(sizes, costs, limit))
    assert sorted(i for batch in batches for i in batch) == list(range(len(items)))
    assert all(sum(sizes[i] for i in batch) <= limit or len(batch) == 1 for batch in batches)
    order = [costs[i] for batch in batches for i in batch]
    assert order == sorted(order, reverse=True)
