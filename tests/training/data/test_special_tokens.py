"""New tokens are initialised as configured, in both embeddings."""

from __future__ import annotations

import pytest
import torch
from transformers import GPTJConfig, GPTJForCausalLM

from tests.training.tiny import make_model, make_tokenizer
from training.data.special_tokens import add_special_tokens

TOKENS = [f"_QUANTILE_TOKEN_{i}_" for i in range(3)]


def matrices(model: torch.nn.Module) -> list[torch.Tensor]:
    return [model.get_input_embeddings().weight, model.get_output_embeddings().weight]


@pytest.mark.parametrize("tied", [True, False])
def test_mean_std_initialisation(tied: bool) -> None:
    tokenizer = make_tokenizer()
    model, old = make_model(len(tokenizer), tied=tied), len(tokenizer)
    before = [m.detach().clone() for m in matrices(model)]
    ids = add_special_tokens(model, tokenizer, TOKENS, "mean_std", seed=7)
    assert ids == [old, old + 1, old + 2]
    assert model.config.vocab_size == len(tokenizer) == old + 3
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) is tied
    for matrix, was in zip(matrices(model), before, strict=True):
        assert torch.equal(matrix[:old], was)
    # Both matrices draw from one generator in turn: the first can be recomputed, the second differs.
    generator = torch.Generator().manual_seed(7)
    draw = torch.randn((3, was.shape[1]), generator=generator, dtype=torch.float64)
    expected = before[0].double().mean(0) + before[0].double().std(0) * draw
    assert torch.allclose(matrices(model)[0][old:].double(), expected, atol=1e-6)
    assert torch.equal(matrices(model)[0][old:], matrices(model)[1][old:]) is tied


@pytest.mark.parametrize("tied", [True, False])
def test_eos_initialisation_copies_the_end_token(tied: bool) -> None:
    tokenizer = make_tokenizer()
    model, old = make_model(len(tokenizer), tied=tied), len(tokenizer)
    add_special_tokens(model, tokenizer, TOKENS, "eos", seed=0)
    for matrix in matrices(model):
        assert torch.equal(matrix[old:], matrix[tokenizer.eos_token_id].expand(3, -1))


def gptj(vocabulary: int) -> GPTJForCausalLM:
    """A model whose LM head has a bias."""
    torch.manual_seed(0)
    config = GPTJConfig(vocab_size=vocabulary, n_positions=8, n_embd=8, n_layer=1, n_head=2, rotary_dim=2)
    model = GPTJForCausalLM(config)
    torch.nn.init.normal_(model.lm_head.bias)
    return model


@pytest.mark.parametrize("init", ["eos", "mean_std"])
def test_output_bias_is_resized_too(init: str) -> None:
    tokenizer = make_tokenizer()
    model, old = gptj(len(tokenizer)), len(tokenizer)
    before = model.lm_head.bias.detach().clone()
    ids = add_special_tokens(model, tokenizer, TOKENS, init, seed=0)
    assert ids == [old, old + 1, old + 2]
    after = model.lm_head.bias
    assert after.shape == (old + 3,) and torch.equal(after[:old], before)
    if init == "eos":
        assert torch.equal(after[old:], before[tokenizer.eos_token_id].expand(3))
    else:
        assert after[old:].unique().numel() == 3
        assert (after[old:] - before.mean()).abs().max() < 4 * before.std()
    for matrix in matrices(model):
        assert matrix.shape[0] == old + 3
    assert not torch.equal(matrices(model)[0][old:], matrices(model)[1][old:])  # not tied


def test_known_tokens_are_left_alone() -> None:
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    first = add_special_tokens(model, tokenizer, TOKENS, "mean_std", seed=0)
    before = matrices(model)[0].detach().clone()
    assert add_special_tokens(model, tokenizer, TOKENS, "mean_std", seed=1) == first
    assert torch.equal(matrices(model)[0], before)


def test_padded_vocabularies_are_filled_before_they_grow() -> None:
    tokenizer = make_tokenizer()
    old = len(tokenizer)
    model = make_model(old + 10)
    with torch.no_grad():
        matrices(model)[0][old:] = 1000.0  # padding must not count for mean and spread
    add_special_tokens(model, tokenizer, TOKENS, "mean_std", seed=0)
    assert matrices(model)[0].shape[0] == old + 10
    assert matrices(model)[0][old : old + 3].abs().max() < 10


def test_a_special_token_is_one_token_and_is_not_decoded() -> None:
    tokenizer = make_tokenizer()
    [first, *_] = add_special_tokens(make_model(len(tokenizer)), tokenizer, TOKENS, "mean_std", seed=0)
    encoded = tokenizer(f"{TOKENS[0]}def f(a):")["input_ids"]
    assert encoded[0] == first and first not in encoded[1:]
    assert tokenizer.decode(encoded, skip_special_tokens=True) == "def f(a):"


def test_eos_initialisation_requires_an_end_token() -> None:
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="use 'mean_std'"):
        add_special_tokens(make_model(len(tokenizer)), tokenizer, TOKENS, "eos", seed=0)
