"""Speed of the embedded sampler compared with transformers' own ``generate``, in one process and one run.

    python -m benchmarks.sampling                      # a random Llama of 1 M weights
    python -m benchmarks.sampling --model FOLDER --threads 2

Prints tokens per CPU second for both, run alternately (the median of the rounds), and the sampling
worker's start-up time and tokens per second of wall time.
"""

from __future__ import annotations

import os

os.environ.setdefault("GOMP_SPINCOUNT", "0")  # before torch: see TransformersSampler

import argparse
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SETTINGS: dict[str, dict[str, float]] = {
    "temperature 1": {"temperature": 1.0},
    "temperature 0.8, top_p 0.9": {"temperature": 0.8, "top_p": 0.9},
    "temperature 1, top_k 50": {"temperature": 1.0, "top_k": 50},
    "greedy": {"temperature": 0.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampling",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, help="transformers folder (default: random 1 M Llama)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--samples", type=int, default=8, help="completions per prompt")
    parser.add_argument("--tokens", type=int, default=112, help="new tokens per completion")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model: Any = (
        AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
        if options.model
        else random_llama()
    ).eval()
    draw = random.Random(0)
    prompts = [
        [draw.randrange(2, model.config.vocab_size) for _ in range(draw.randint(8, 16))]
        for _ in range(options.prompts)
    ]
    print(
        f"{model.num_parameters() / 1e6:.2f} M weights, {options.prompts} x {options.samples} "
        f"completions of {options.tokens} tokens, {options.threads} thread(s), tokens/CPU s"
    )
    for name, setting in SETTINGS.items():
        speeds: dict[str, list[float]] = {"generate": [], "sampler": []}
        for _ in range(options.rounds):
            for way, decode in (("generate", with_generate), ("sampler", with_sampler)):
                speeds[way].append(decode(model, prompts, options, setting))
        theirs, ours = (statistics.median(speeds[way]) for way in ("generate", "sampler"))
        print(f"{name:28}  generate {theirs:8.0f}  sampler {ours:8.0f}  ratio {ours / theirs:.2f}")
    if options.model:
        worker(options)


def random_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=2048, hidden_size=128, intermediate_size=352, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=0, pad_token_id=1))  # fmt: skip
    model.lm_head.weight.data *= 15  # about 3.5 nats per token, like a trained model of this size
    return model


def measured(work: Callable[[], object], tokens: int) -> float:
    started = time.process_time()
    work()
    return tokens / (time.process_time() - started)


def with_generate(
    model: Any, prompts: list[list[int]], options: argparse.Namespace, setting: dict[str, float]
) -> float:
    import torch

    width = max(map(len, prompts))
    rows = [prompt for prompt in prompts for _ in range(options.samples)]
    ids = torch.tensor([[1] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    chosen: dict[str, Any] = {"do_sample": False}
    if setting["temperature"]:
        chosen = {"do_sample": True, "top_k": 0, **setting}
    model.set_attn_implementation("sdpa")
    with torch.inference_mode():
        return measured(
            lambda: model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=options.tokens,
                min_new_tokens=options.tokens, **chosen,
            ),
            len(rows) * options.tokens,
        )  # fmt: skip


def with_sampler(
    model: Any, prompts: list[list[int]], options: argparse.Namespace, setting: dict[str, float]
) -> float:
    from resources.engines.transformers import attention
    from resources.engines.transformers.decoding import Rule, sample

    attention.install(model)
    rule = Rule(
        temperature=setting["temperature"],
        top_k=int(setting.get("top_k", 0)),
        top_p=setting.get("top_p", 1.0),
        max_new_tokens=options.tokens,
        min_new_tokens=options.tokens,
        end_ids=(0,),
        banned_ids=(),
    )
    owners = [i for i in range(len(prompts)) for _ in range(options.samples)]
    count = len(owners)
    return measured(lambda: sample(model, prompts, owners, range(count), rule), count * options.tokens)


def worker(options: argparse.Namespace) -> None:
    from resources.engines.sampler import Decoding, Request
    from resources.engines.transformers.sampler import TransformersSampler

    with TransformersSampler(threads=options.threads) as sampler:
        started = time.perf_counter()
        sampler.generate(options.model, [Request("a", (0,))], Decoding(1.0, max_new_tokens=1))
        print(f"worker: first token after {time.perf_counter() - started:.1f} s of wall time")
        requests = [Request(f"def f{i}(x):", tuple(range(options.samples))) for i in range(options.prompts)]
        decoding = Decoding(1.0, max_new_tokens=options.tokens, ignore_eos=True)
        started = time.perf_counter()
        rows = sampler.generate(options.model, requests, decoding)
        total = sum(one.n_tokens for row in rows for one in row)
        print(f"worker: {total / (time.perf_counter() - started):.0f} tokens/s of wall time")


if __name__ == "__main__":
    main()
