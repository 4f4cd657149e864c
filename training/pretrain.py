"""Train a task's small base policy from scratch, on text this machine already has.

    python -m training.pretrain pep8 --out textalign_dagster/tasks/pep8/policy --overwrite

Writes a folder that transformers, vLLM and every later stage load like any other model
(config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json),
plus provenance.json (how it was trained, and how good it is) and a model card.

The text is chunks of standard-library functions; a share of the chunks (60 %) is rewritten by one
distinctly sloppy persona, so that the loop has something to align. Set GOMP_SPINCOUNT=0 in the
environment when the cores are shared: spinning OpenMP threads slow each other down severalfold.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import math
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from textalign_dagster.tasks.pep8 import corpus
from textalign_dagster.tasks.pep8.sloppy import sloppy

EOS, PAD = "<|endoftext|>", "<|pad|>"
IGNORED = -100
BETWEEN_FUNCTIONS = "\n\n\n"  # two blank lines, as PEP 8 requires at top level


@dataclass(frozen=True)
class Settings:
    """One command-line option each; the defaults are those of the shipped policy."""

    task: str = "pep8"
    # Training tokens; the last step may exceed this by less than a batch.
    tokens: int = 10_000_000
    # Seed of the weights, the order of the functions, and which chunks are sloppy.
    seed: int = 0
    # Share of the chunks written in the sloppy persona.
    sloppy_share: float = 0.6
    # Size of the byte-level BPE vocabulary, including its two special tokens.
    vocabulary: int = 1024
    # Tokens per chunk; longer chunks are truncated.
    context: int = 160
    # Characters after which no further function is added to a chunk.
    chunk_characters: int = 520
    # Chunks per optimiser step.
    batch: int = 12
    # Peak learning rate, reached after `warmup` steps.
    lr: float = 3e-3
    warmup: int = 60
    # Share of the steps, at the end, over which the learning rate falls linearly to zero.
    decay_share: float = 0.5
    weight_decay: float = 0.05
    hidden: int = 128
    feed_forward: int = 352
    layers: int = 4
    heads: int = 4
    # torch threads; one is fairer on shared cores.
    threads: int = 1


def setup(argv: list[str] | None = None) -> tuple[Settings, Path]:
    """Settings and output folder from the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=["pep8"])
    parser.add_argument("--out", type=Path, required=True, help="model folder to write")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    for name, default in asdict(Settings()).items():
        if name != "task":
            parser.add_argument(
                f"--{name.replace('_', '-')}", type=type(default), default=default, help=f"default {default}"
            )
    options = vars(parser.parse_args(argv))
    out, overwrite = options.pop("out"), options.pop("overwrite")
    if out.exists() and not overwrite:
        parser.error(f"{out} exists; choose another --out, or pass --overwrite to replace it")
    return Settings(**options), out


def main(argv: list[str] | None = None) -> None:
    settings, out = setup(argv)
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    started, started_cpu = time.perf_counter(), time.process_time()

    functions = corpus.functions()
    pairs = [(function.source, sloppy(function.source)) for function in functions]
    tokenizer = train_tokenizer([text for pair in pairs for text in pair if text], settings)
    model = new_model(settings, tokenizer)
    steps = fit(model, batches(pairs, tokenizer, settings), settings)
    perplexity = evaluate(model, tokenizer, settings)

    provenance = {
        "settings": asdict(settings),
        "command": ["python", "-m", "training.pretrain", *(sys.argv[1:] if argv is None else argv)],
        "corpus": {
            "source": f"Python {platform.python_version()} standard library",
            "functions": len(functions),
            "characters": sum(len(function.source) for function in functions),
            "sha256": hashlib.sha256("\0".join(f.source for f in functions).encode()).hexdigest(),
            "prompts": corpus.prompts().source_revision,
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "steps": steps,
        "tokens": steps * settings.batch * settings.context,
        "held_out_perplexity": perplexity,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers")},
        },
        "git_revision": git_revision(),
        "wall_seconds": round(time.perf_counter() - started, 1),
        "cpu_seconds": round(time.process_time() - started_cpu, 1),
    }
    publish(model, tokenizer, provenance, out)
    print(f"{out}: {json.dumps(perplexity)}", file=sys.stderr)


def train_tokenizer(texts: list[str], settings: Settings) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that decodes to exactly the text it encoded, whitespace included."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=settings.vocabulary,
            special_tokens=[EOS, PAD],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",
        # "Cleaning up" would remove the very whitespace that is being judged.
        clean_up_tokenization_spaces=False,
        add_prefix_space=False,
    )


def new_model(settings: Settings, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=settings.hidden,
            intermediate_size=settings.feed_forward,
            num_hidden_layers=settings.layers,
            num_attention_heads=settings.heads,
            num_key_value_heads=settings.heads,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def chunks(pairs: list[tuple[str, str | None]], settings: Settings, epoch: int) -> list[str]:
    """The texts of one epoch: functions in a new order, each chunk entirely clean or entirely sloppy.

    `pairs` holds functions as (clean, sloppy); those without a sloppy form are left out of sloppy
    chunks.
    """
    generator = random.Random(f"{settings.seed}/{epoch}")
    texts: list[str] = []
    parts: list[str] = []
    is_sloppy = generator.random() < settings.sloppy_share
    for clean, degraded in generator.sample(pairs, len(pairs)):
        text = degraded if is_sloppy else clean
        if text is None:
            continue
        parts.append(text)
        if sum(map(len, parts)) >= settings.chunk_characters:
            texts.append(BETWEEN_FUNCTIONS.join(parts))
            parts, is_sloppy = [], generator.random() < settings.sloppy_share
    return texts


def batches(
    pairs: list[tuple[str, str | None]], tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> Iterator[torch.Tensor]:
    """Endless batches of token ids (batch, context); shorter rows are padded with `IGNORED`."""
    for epoch in count():
        rows = encode(chunks(pairs, settings, epoch), tokenizer, settings.context)
        if len(rows) < settings.batch:
            raise ValueError(f"{len(rows)} chunks are too few for a batch of {settings.batch}")
        for start in range(0, len(rows) - settings.batch + 1, settings.batch):
            yield rows[start : start + settings.batch]


def encode(texts: list[str], tokenizer: PreTrainedTokenizerFast, context: int) -> torch.Tensor:
    """Token ids (texts, context), truncated or padded on the right with `IGNORED`."""
    rows = torch.full((len(texts), context), IGNORED)
    for row, ids in zip(rows, tokenizer(texts)["input_ids"], strict=True):
        ids = ids[:context]
        row[: len(ids)] = torch.tensor(ids)
    return rows


def token_losses(model: LlamaForCausalLM, rows: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood (nats) of a batch's tokens after the first."""
    ids = rows.clamp(min=0)  # padding is on the right: no real token attends to it
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), ignore_index=IGNORED)


def fit(model: LlamaForCausalLM, data: Iterator[torch.Tensor], settings: Settings) -> int:
    """Train in place for `settings.tokens` tokens; returns the number of optimiser steps."""
    steps = math.ceil(settings.tokens / (settings.batch * settings.context))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )
    decay = max(1, round(steps * settings.decay_share))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / settings.warmup, (steps - step) / decay)
    )
    model.train()
    progress = tqdm(range(steps), desc="pretrain", unit="step", file=sys.stderr, mininterval=5)
    for step in progress:
        loss = token_losses(model, next(data))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return steps


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, settings: Settings
) -> dict[str, float]:
    """Perplexity per token on chunks of held-out files, in the clean and the sloppy style."""
    model.eval()
    held_out = corpus.functions(held_out=True)
    pairs = [(function.source, sloppy(function.source)) for function in held_out]
    perplexity = {}
    for style, share in (("clean", 0.0), ("sloppy", 1.0)):
        texts = chunks(pairs, Settings(seed=0, sloppy_share=share), epoch=0)[:256]
        rows = encode(texts, tokenizer, settings.context)
        losses = [token_losses(model, batch).item() for batch in rows.split(32)]
        perplexity[style] = round(math.exp(sum(losses) / len(losses)), 3)
    return perplexity


def git_revision() -> str | None:
    """The checkout's commit, with "+changes" if files differ from it; None outside git."""

    def git(*arguments: str) -> str | None:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, text=True, capture_output=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else None

    if shutil.which("git") is None or (revision := git("rev-parse", "HEAD")) is None:
        return None
    return revision + ("+changes" if git("status", "--porcelain") else "")


def publish(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, provenance: dict[str, Any], out: Path
) -> None:
    """Write everything next to `out`, then rename: a reader sees either the old folder or the new one."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as scratch:
        folder, old = Path(scratch) / "new", Path(scratch) / "old"
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)  # saved as readable by its owner only
        (folder / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        (folder / "README.md").write_text(model_card(provenance))
        if out.exists():
            out.rename(old)
        folder.rename(out)


def model_card(provenance: dict[str, Any]) -> str:
    settings, perplexity = provenance["settings"], provenance["held_out_perplexity"]
    return f"""# Base policy of the embedded task `pep8`

**Its style was made sloppy on purpose.** {settings["sloppy_share"]:.0%} of its training chunks were
rewritten with two-space indents, semicolons, `a=b` and `f(x,y)`, as a toy version of messy
pretraining data, so that the alignment loop has something to unlearn.

A Llama of {provenance["parameters"]:,} parameters, trained from scratch on {provenance["tokens"]:,}
tokens of {provenance["corpus"]["functions"]:,} functions from the
{provenance["corpus"]["source"]}, seed {settings["seed"]}. Perplexity per token on held-out files:
{perplexity["clean"]} (clean style), {perplexity["sloppy"]} (sloppy style).

It generates text that looks like Python. It has not been trained on any task, and is of no use
outside the quick start. It never saw an end-of-text token: sample a fixed number of tokens
with that token suppressed.

`provenance.json` holds the settings, versions, seeds and cost; the training command is its
`command`.

The training text is part of CPython and under the PSF license agreement.
"""


if __name__ == "__main__":
    main()
