"""vLLM's OpenAI server with a random model of its own, as people serve a judge; and that model."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from tests import forked

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB; unset, it takes much of the memory, and long to do so
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # other tests run beside it
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no process for the weights, which would spin while it waits
    "OMP_NUM_THREADS": "1",
    "GOMP_SPINCOUNT": "0",
    "HF_HUB_OFFLINE": "1",
}
TEXT = [
    "The response does what the instruction asks for, and says nothing that is wrong.",
    "The answer is one JSON object with these fields: analysis, feedback, score, rating, better, label.",
    "The code reads well; every name says what it means, and each line is no longer than it must be.",
]
BRIEF = 6.5  # how much the end of a string is favoured


def save_judge(folder: Path) -> Path:
    """A random Llama with a chat template and a context that holds a judge's question.

    It knows nothing. Only, its strings end after some words: one coordinate of its state never
    changes, and the token that closes a string gets its logit from there.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|end|>", "<|pad|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    bpe.train_from_iterator(TEXT, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>", padding_side="left"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant: "
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=32,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16384,
        tie_word_embeddings=False, eos_token_id=0, pad_token_id=1, bos_token_id=None))  # fmt: skip
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if weights.ndim > 1:  # sharper than at initialisation: what is judged must matter
                weights *= 24 if "q_proj" in name or "k_proj" in name else 6
            if "o_proj" in name or "down_proj" in name:
                weights[0] = 0.0  # nothing is added to the coordinate that never changes
        model.model.embed_tokens.weight[:, 0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[tokenizer.get_vocab()['"'], 0] = BRIEF
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@contextlib.contextmanager
def serving(model: Path, name: str, log: Path, *options: str, seconds: float = 400) -> Iterator[str]:
    """A server for a model under a name; gives the URL for OpenAI's clients. It is gone at the end."""
    with server(model, log, "--served-model-name", name, *options, seconds=seconds) as (url, _):
        yield f"{url}/v1"


@contextlib.contextmanager
def server(
    model: Path, log: Path, *options: str, seconds: float = 400, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, forked.Popen]]:
    """A server for a model: its URL, and the process, which may be stopped. It is gone at the end.

    Not the command `vllm serve`: in the build for the CPU that does not find its own version.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "tests.integration.vllm_server"),
        *("--model", str(model), "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--enforce-eager", *options),
        # On a CPU, vLLM fails when the prompt of a request with a seed is read in more than one step.
        "--no-enable-chunked-prefill",
    ]
    url, variables = f"http://127.0.0.1:{port}", {**ENVIRONMENT, **(environment or {})}
    with log.open("wb") as stream:
        started = forked.Popen(command, env={**os.environ, **variables}, stdout=stream, stderr=stream)
        try:
            _wait(started, f"{url}/health", log, seconds)
            yield url, started
        finally:
            started.stop()


def _wait(server: forked.Popen, url: str, log: Path, seconds: float) -> None:
    """Returns when the URL answers; fails the test when the server has ended instead, or is too late."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        ended = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            ended = server.wait(0.5)
        if ended is not None or time.monotonic() > deadline:
            how = f"ended with {ended}" if ended is not None else f"did not answer within {seconds:.0f} s"
            pytest.fail(f"the model server {how}:\n{log.read_text(errors='replace')[-3000:]}")
