"""Random language models of a few thousand weights, saved as transformers folders."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CONTEXT = 64
TEXT = [
    "def add(a, b):\n    return a + b\n",
    "for name in names:\n    print(name)\n",
    "class Thing:\n    value = 3  # a number\n",
]


def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 300 tokens; <|end|> is 0, <|pad|> 1, <|best|> 2."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|end|>", "<|pad|>", "<|best|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|best|>"],
        padding_side="left",
    )


def model(kind: str, seed: int = 0) -> torch.nn.Module:
    """A "llama" (rotary positions, grouped keys) or a "gpt2" (absolute positions, tied)."""
    torch.manual_seed(seed)
    ends = {"eos_token_id": 0, "pad_token_id": 1, "bos_token_id": None}
    if kind == "llama":
        built = LlamaForCausalLM(LlamaConfig(
            vocab_size=304, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=CONTEXT,
            tie_word_embeddings=False, **ends))  # fmt: skip
    else:
        built = GPT2LMHeadModel(GPT2Config(
            vocab_size=304, n_embd=32, n_layer=2, n_head=4, n_positions=CONTEXT, **ends))  # fmt: skip
    for weights in built.parameters():  # sharper than at initialisation, so that context matters
        if weights.ndim > 1:
            weights.data *= 6
    return built.eval()


def save(folder: Path, kind: str, seed: int = 0) -> Path:
    built = model(kind, seed)
    built.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder
