"""CPU seconds of a training by this project and by TRL's trainer of the same name, in one run.

    python -m benchmarks.training
    python -m benchmarks.training --rows 512 --batch 16 --repeats 3 --policy path/to/a/folder

A policy (the embedded one) is trained for an epoch on synthetic rows of 20 to 160 tokens, the same ones in both,
with the same number of rows per step and AdamW in float32. Both batch rows of similar length together; TRL is also
run without, its default. GRPO's samples, four per prompt, are passed to TRL's trainer where it would sample: before
each step, its default (it then needs no log-probabilities of the sampling policy), or once for all steps, as an
experiment samples. Of each kind the fastest of ``--repeats`` trainings counts: the steps, and the log-probabilities
of the reference. Reading and tokenising rows, loading and saving models do not count.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import polars as pl

from benchmarks.packing import LONGEST, POLICY, Stopwatch, one_token
from training.job import Job
from training.progress import Silent
from training.train import run

SHORTEST, MAX_LENGTH = 20, 256
TRAININGS = ("sft", "dpo", "kto", "grpo")
GROUP = 4
SORTED, ONCE = "TRL, sorted by length", "TRL, one sampling for all steps"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rows", type=int, default=256, help="texts; half as many pairs")
    parser.add_argument("--batch", type=int, default=16, help="texts per step")
    parser.add_argument("--repeats", type=int, default=3, help="trainings of each kind")
    parser.add_argument("--policy", type=Path, default=POLICY, help="transformers folder")
    parser.add_argument("--only", choices=TRAININGS, help="run only this training")
    options = parser.parse_args()
    import datasets
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    datasets.disable_progress_bars()
    torch.set_num_threads(1)
    for name in TRAININGS:
        if options.only not in (None, name):
            continue
        rows = made_up(options.policy, options.rows, name)
        kinds = ["here", SORTED, "TRL, default"]
        if name == "grpo":
            kinds.append(ONCE)
        seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(options.repeats):
            for kind in kinds:
                with tempfile.TemporaryDirectory() as folder:
                    if kind == "here":
                        spent = ours(name, rows, Path(folder), options)
                    elif name == "grpo":
                        spent = their_grpo(rows, Path(folder), options, kind)
                    else:
                        spent = theirs(name, rows, Path(folder), options, kind == SORTED)
                seconds[kind].append(spent)
        print(f"{name}: {options.rows} texts of {SHORTEST} to {LONGEST} tokens in steps of {options.batch}")
        for kind, times in seconds.items():
            print(f"  {kind:32} {min(times):6.2f} s  {min(times) / min(seconds['here']):.2f}")


def made_up(policy: Path, count: int, name: str) -> pl.DataFrame:
    """Texts with a third of their tokens as prompt; those of a pair or group share a prompt."""
    piece, rng = one_token(policy), np.random.default_rng(0)
    lengths = rng.integers(SHORTEST, LONGEST - 1, count)
    size = {"dpo": 2, "grpo": GROUP}.get(name, 1)
    prompts = np.repeat(lengths[::size] // 3, size)
    return pl.DataFrame(
        {
            # Prompts differ, so that texts can be read after another text's.
            "prompt": [f"{i // size}{piece * n}" for i, n in enumerate(prompts)],
            "text": [piece * max(4, n - p) for n, p in zip(lengths, prompts, strict=True)],
            "chosen": [i % 2 == 0 for i in range(count)],
            "group": [i // max(size, 2) for i in range(count)],
            "reward": rng.normal(size=count),
        }
    )


def ours(name: str, rows: pl.DataFrame, folder: Path, options: argparse.Namespace) -> float:
    """CPU seconds of the trainer that experiments use."""
    from training import reference_log_probs
    from training.trainer import ObjectiveTrainer

    count = rows.height
    role = pl.when("chosen").then(pl.lit("chosen")).otherwise(pl.lit("rejected"))
    rows.with_row_index("i").select(
        "prompt",
        "text",
        sample_id=pl.col("i").cast(pl.String),
        condition=pl.lit(None, dtype=pl.String),
        finish_reason=pl.lit("stop"),
        n_tokens=pl.lit(1),
        weight=pl.lit(1.0),
        role={"sft": pl.lit("only"), "grpo": pl.lit("member")}.get(name, role),
        group_id=pl.col("group").cast(pl.String)
        if name in ("dpo", "grpo")
        else pl.lit(None, dtype=pl.String),
        reward="reward",
        second_prompt=pl.Series([rows["prompt"][(i + 1) % count] for i in range(count)])
        if name == "kto"
        else pl.lit(None, dtype=pl.String),
    ).write_parquet(folder / "rows.parquet")
    objective: dict[str, Any] = {
        "sft": {"name": "nll", "entropy_coef": 0.0, "kl_coef": 0.0},
        "grpo": {"name": "grpo"},
    }.get(name, {"name": name, "beta": 0.1})
    job = Job.model_validate(
        {
            "rows": str(folder / "rows.parquet"),
            "policy": str(options.policy),
            "reference": None if name == "sft" else str(options.policy),
            "out": str(folder / "out"),
            "beside": str(folder / "beside"),
            "threads": 1,
            "training": {
                "epochs": 1,
                "batch_size": options.batch,
                "max_length": MAX_LENGTH,
                "objective": objective,
            },
        }
    )
    watch = Stopwatch()
    with (
        mock.patch.object(ObjectiveTrainer, "train", watch.around(ObjectiveTrainer.train)),
        mock.patch.object(reference_log_probs, "tabulate", watch.around(reference_log_probs.tabulate)),
    ):
        run(job, Silent())
    return watch.seconds


def theirs(
    name: str, rows: pl.DataFrame, folder: Path, options: argparse.Namespace, by_length: bool
) -> float:
    """CPU seconds of TRL's trainer, with its own reference."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    tokenizer = their_tokenizer(options.policy)
    model, reference = (AutoModelForCausalLM.from_pretrained(options.policy) for _ in range(2))
    shared: dict[str, Any] = their_settings(folder) | {
        "max_length": MAX_LENGTH,
        "train_sampling_strategy": "group_by_length" if by_length else "random",
        "remove_unused_columns": not by_length,  # the length would be unused
    }
    given = rows.select("prompt", completion="text", label="chosen")
    if name == "dpo":  # TRL's rows are pairs
        sides = rows.filter("chosen").join(rows.filter(~pl.col("chosen")), on="group", suffix="_worse")
        given = sides.select("prompt", chosen="text", rejected="text_worse")
        shared["per_device_train_batch_size"] = options.batch // 2
    else:
        shared["per_device_train_batch_size"] = options.batch
    if name == "sft":
        given = given.drop("label")
    if name == "kto":  # rows stay in file order, so sort them here if requested
        shared |= {"train_sampling_strategy": "sequential", "remove_unused_columns": True}
        if by_length:
            given = given.sort(pl.col("prompt").str.len_chars() + pl.col("completion").str.len_chars())
    data = Dataset.from_list(given.to_dicts())
    common = {"model": model, "train_dataset": data, "processing_class": tokenizer}
    trainer: Any
    if name == "sft":
        trainer = trl.SFTTrainer(args=trl.SFTConfig(**shared), **common)
    elif name == "dpo":
        trainer = trl.DPOTrainer(ref_model=reference, args=trl.DPOConfig(beta=0.1, **shared), **common)
    else:
        trainer = trl.KTOTrainer(ref_model=reference, args=trl.KTOConfig(beta=0.1, **shared), **common)
    if by_length and name != "kto":  # TRL's preference trainers do not add the length
        tokens = [name for name in trainer.train_dataset.column_names if name.endswith("ids")]
        lengths = [sum(len(row[name]) for name in tokens) for row in trainer.train_dataset]
        if "length" not in trainer.train_dataset.column_names:
            trainer.train_dataset = trainer.train_dataset.add_column("length", lengths)
    watch = Stopwatch()
    watch.around(trainer.train)()
    return watch.seconds


def their_grpo(rows: pl.DataFrame, folder: Path, options: argparse.Namespace, kind: str) -> float:
    """CPU seconds of TRL's GRPO trainer, which is passed the samples where it would draw them."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    tokenizer = their_tokenizer(options.policy)
    encoded = {
        prompt: [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
        for prompt, texts in rows.group_by("prompt", maintain_order=True).agg("text").iter_rows()
    }
    rewards = dict(rows.group_by("prompt").agg("reward").iter_rows())

    def given(prompts: list[str], trainer: Any) -> dict[str, Any]:
        members = [i % GROUP for i in range(len(prompts))]  # each prompt appears GROUP times in a row
        return {
            "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
            "completion_ids": [encoded[prompt][i] for prompt, i in zip(prompts, members, strict=True)],
            "logprobs": None,
            "known": [rewards[prompt][i] for prompt, i in zip(prompts, members, strict=True)],
        }

    def reward(known: list[float], **_: Any) -> list[float]:
        return known

    prompts = list(encoded)
    if kind == SORTED:
        prompts.sort(key=lambda prompt: len(prompt) + max(map(len, encoded[prompt])))
    steps = rows.height // options.batch if kind == ONCE else 1
    settings = their_settings(folder) | {
        "per_device_train_batch_size": options.batch,
        "num_generations": GROUP,
        "max_completion_length": MAX_LENGTH,
        "steps_per_generation": steps,
        "shuffle_dataset": kind != SORTED,
    }
    trainer = trl.GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.policy),
        reward_funcs=reward,
        args=trl.GRPOConfig(**settings),
        train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer,
        rollout_func=given,
    )
    watch = Stopwatch()
    watch.around(trainer.train)()
    assert trainer.state.global_step == rows.height // options.batch
    return watch.seconds


def their_tokenizer(policy: Path) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return tokenizer


def their_settings(folder: Path) -> dict[str, Any]:
    """Settings of transformers' trainer that all of TRL's trainers get."""
    return {
        "output_dir": str(folder),
        "num_train_epochs": 1,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "disable_tqdm": True,
    }


if __name__ == "__main__":
    main()
