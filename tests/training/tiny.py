"""A tiny policy, its tokenizer, and rows to train on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from resources.launchers.launcher import Acceleration, accelerate_command

CORPUS = [
    "def add(a, b):\n    return a + b\n",
    "def sub(a, b):\n    return a - b\n",
    "x = [1, 2, 3]\n",
    "feedback: good input: ",
]


def make_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|pad|>", *(["<|start|>"] if bos else [])]
    bpe.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=special,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    if bos:
        from tokenizers.processors import TemplateProcessing

        bpe.post_processor = TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        bos_token="<|start|>" if bos else None,
        clean_up_tokenization_spaces=False,
    )


def make_model(vocabulary: int, seed: int = 0, tied: bool = True, width: int = 32) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=96,
        initializer_range=0.1,  # far enough from uniform for a measurable KL
        tie_word_embeddings=tied,
        eos_token_id=0,
        pad_token_id=1,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def make_rows(count: int = 24) -> pl.DataFrame:
    texts = ["\n    return a + b\n", "\n    return a - b\n", "\n    x = [1, 2, 3]\n    return x\n"]
    return pl.DataFrame(
        {
            "sample_id": [f"s{i}" for i in range(count)],
            "prompt": [f"def f{i}(a, b):" for i in range(count)],
            "condition": ["good" if i % 2 else None for i in range(count)],
            "text": [texts[i % 3] for i in range(count)],
            "finish_reason": ["stop" if i % 4 else "length" for i in range(count)],
            "n_tokens": [10] * count,
            "weight": [1.0 + (i % 2) for i in range(count)],
        },
        schema_overrides={"n_tokens": pl.Int32},
    )


def write_job(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "job.json"
    path.write_text(json.dumps(content))
    return path


def write_training(
    folder: Path, place: Callable[[str], Path], acceleration: Acceleration, **training: Any
) -> list[str]:
    """Writes policy, rows and job for the real trainer; returns the command.

    Args:
        place: returns a folder of a launcher's work by name.
        training: settings of the training.
    """
    make_rows().write_parquet(folder / "rows.parquet")
    tokenizer = make_tokenizer()
    for part in (tokenizer, make_model(len(tokenizer))):
        part.save_pretrained(folder / "policy")
    job = {
        "rows": str(folder / "rows.parquet"),
        "policy": str(folder / "policy"),
        "out": str(place("model")),
        "snapshots": str(place("snapshots")),
        "template": "feedback: {condition} input: {prompt}",
        "world_size": acceleration.processes,
        "training": {"max_length": 64, **training},
    }
    return [*accelerate_command(acceleration), "training.train", str(write_job(place("job"), job))]
