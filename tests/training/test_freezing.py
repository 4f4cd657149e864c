"""Which parameters train when only the last blocks do: the exact names, in three architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from training.freezing import train_last_blocks, transformer_blocks


def llama(layers: int = 4, tied: bool = False) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=11,
        hidden_size=4,
        intermediate_size=4,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )


def model_of(config: PretrainedConfig) -> PreTrainedModel:
    model: Any = AutoModelForCausalLM.from_config(config)
    return model


def trained(model: PreTrainedModel) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad]


def block(prefix: str, index: int, names: str) -> list[str]:
    return [f"{prefix}.{index}.{name}" for name in names.split()]


GPT2 = (
    "ln_1.weight ln_1.bias attn.c_attn.weight attn.c_attn.bias attn.c_proj.weight attn.c_proj.bias "
    "ln_2.weight ln_2.bias mlp.c_fc.weight mlp.c_fc.bias mlp.c_proj.weight mlp.c_proj.bias"
)
GPTJ = (
    "ln_1.weight ln_1.bias attn.k_proj.weight attn.v_proj.weight attn.q_proj.weight attn.out_proj.weight "
    "mlp.fc_in.weight mlp.fc_in.bias mlp.fc_out.weight mlp.fc_out.bias"
)
LLAMA = (
    "self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight self_attn.o_proj.weight "
    "mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight input_layernorm.weight "
    "post_attention_layernorm.weight"
)


def test_gpt2_with_tied_embeddings() -> None:
    model = model_of(GPT2Config(vocab_size=11, n_positions=8, n_embd=4, n_layer=3, n_head=2))
    train_last_blocks(model, 1)
    assert trained(model) == [
        "transformer.wte.weight",  # the LM head is the same matrix
        "transformer.wpe.weight",
        *block("transformer.h", 2, GPT2),
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
    ]


def test_gptj() -> None:
    config = GPTJConfig(vocab_size=11, n_positions=8, n_embd=4, n_layer=3, n_head=2, rotary_dim=2)
    model = model_of(config)
    train_last_blocks(model, 0.67)
    assert trained(model) == [
        "transformer.wte.weight",
        *block("transformer.h", 1, GPTJ),
        *block("transformer.h", 2, GPTJ),
        "transformer.ln_f.weight",
        "transformer.ln_f.bias",
        "lm_head.weight",
        "lm_head.bias",
    ]


@pytest.mark.parametrize("tied", [True, False])
def test_llama(tied: bool) -> None:
    model = model_of(llama(tied=tied))
    train_last_blocks(model, 0.5)
    assert trained(model) == [
        "model.embed_tokens.weight",
        *block("model.layers", 2, LLAMA),
        *block("model.layers", 3, LLAMA),
        "model.norm.weight",
        *([] if tied else ["lm_head.weight"]),
    ]


@pytest.mark.parametrize("none", [0, 0.0, 0.2])
def test_none_of_the_blocks(none: float) -> None:
    model = model_of(llama())
    frozen = train_last_blocks(model, none)
    assert trained(model) == ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert len(frozen) == 4 * len(LLAMA.split())


@pytest.mark.parametrize("every", [4, 1.0])
def test_all_of_the_blocks(every: float) -> None:
    model = model_of(llama())
    assert train_last_blocks(model, every) == []
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(("share", "layers", "count"), [(0.3, 28, 8), (0.29, 100, 29), (0.25, 7, 1)])
def test_a_share_is_rounded_down_as_published(share: float, layers: int, count: int) -> None:
    config = llama(layers)
    with torch.device("meta"):
        model = model_of(config)
    train_last_blocks(model, share)
    blocks = {name.split(".")[2] for name in trained(model) if name.startswith("model.layers.")}
    assert blocks == {str(i) for i in range(layers - count, layers)}


def test_list_inside_a_block_is_not_mistaken_for_the_blocks() -> None:
    model = model_of(llama())
    model.model.layers[1].experts = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(4))
    name, blocks = transformer_blocks(model)
    assert name == "model.layers" and blocks is model.model.layers


def test_weights_shared_with_trained_parameters_train() -> None:
    model = model_of(llama())
    layers = model.model.layers
    layers[0].mlp.gate_proj.weight = layers[3].mlp.gate_proj.weight
    layers[1].input_layernorm.weight = model.model.norm.weight
    train_last_blocks(model, 1)
    assert layers[0].mlp.gate_proj.weight.requires_grad and model.model.norm.weight.requires_grad
    assert not layers[0].mlp.up_proj.weight.requires_grad


def test_models_that_cannot_be_frozen() -> None:
    model = model_of(llama())
    with pytest.raises(ValueError, match="cannot train 5 blocks, the model has 4"):
        train_last_blocks(model, 5)
    model.twin = torch.nn.ModuleList(torch.nn.Linear(1, 1) for _ in range(4))
    with pytest.raises(
        ValueError, match=r"cannot be identified .*model.layers, twin.*leave trainable_layers out"
    ):
        train_last_blocks(model, 2)
