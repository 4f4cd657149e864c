"""Random scoring models of a few thousand weights, saved as real ones are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPTJConfig,
    GPTJModel,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from tests.resources.engines.tiny_models import CONTEXT, tokenizer

ENDS = {"eos_token_id": 0, "bos_token_id": None}


def sharpened(model: Any) -> Any:
    """Weights larger than at initialisation, so that every token shows in the score."""
    for weights in model.parameters():
        if weights.ndim > 1:
            weights.data *= 6
    return model.eval()


def classifier(
    folder: Path,
    kind: str,
    *,
    labels: tuple[str, ...] = ("reward",),
    pad: int | None = 1,
    words: PreTrainedTokenizerFast | None = None,
) -> Path:
    """A "gpt2", "llama" or "bert" with one output per label."""
    torch.manual_seed(3)
    options = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
        "pad_token_id": pad,
        **ENDS,
    }
    config: Any
    if kind == "gpt2":
        config = GPT2Config(vocab_size=304, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, **options)
    elif kind == "llama":
        config = LlamaConfig(
            vocab_size=304, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT, **options)  # fmt: skip
    else:
        config = BertConfig(
            vocab_size=304, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, max_position_embeddings=CONTEXT, **options)  # fmt: skip
    if isinstance(config, BertConfig):
        model = BertForSequenceClassification(config)
    else:
        model = AutoModelForSequenceClassification.from_config(config)
    sharpened(model).save_pretrained(folder)
    (words or tokenizer()).save_pretrained(folder)
    return folder


def last_token(folder: Path, *, masks: bool = True, safe: bool = True) -> Path:
    """A GPT-J with a head of one output, as saved by CarperAI, and its config and tokenizer."""
    torch.manual_seed(5)
    config = GPTJConfig(
        vocab_size=304, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, rotary_dim=4,
        pad_token_id=0, **ENDS)  # fmt: skip
    body = sharpened(GPTJModel(config))
    state = {f"transformer.{name}": t.contiguous() for name, t in body.state_dict().items()}
    state["v_head.weight"] = torch.randn(1, 32)
    if masks:  # buffers in the state dict of GPT-J in the versions of that time
        for layer in range(2):
            mask = torch.tril(torch.ones(CONTEXT, CONTEXT, dtype=torch.bool)).view(1, 1, CONTEXT, CONTEXT)
            state[f"transformer.h.{layer}.attn.bias"] = mask
            state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    words = tokenizer()
    words.pad_token = words.eos_token
    words.save_pretrained(folder)
    if safe:
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")
    return folder
