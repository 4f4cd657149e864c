"""Train a policy on the rows of a job.

    accelerate launch --num_processes 1 … -m training.train JOB.json

Writes the job's ``out`` folder: model.safetensors, config.json, generation_config.json, the
tokenizer, and last ``done.json`` {steps, rows, tokens, final_loss, losses, seconds, load_seconds,
train_seconds, save_seconds, world_size}. Without that file the folder is not a checkpoint. Nothing
is evaluated here. On the CPU two runs of one job give the same bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

STARTED = time.monotonic()

from training.job import Job, JobError, TrainingError, read_job  # noqa: E402 (the clock runs first)
from training.progress import Reporter, open_reporter  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TrainingArguments

    from training.trainer import ObjectiveTrainer

DONE = "done.json"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m training.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("job", type=Path, help="job file (training/job.py)")
    arguments = parser.parse_args(argv)
    try:
        with open_reporter() as reporter:
            run(read_job(arguments.job), reporter)
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(job: Job, reporter: Reporter) -> dict[str, Any]:
    """Load, train, save; returns what done.json says.

    Raises:
        JobError: bad input, before any training.
        NonFiniteError: the loss is no number any more; nothing is saved.
    """
    from training.examples import read_rows

    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / DONE).unlink(missing_ok=True)
    rows = read_rows(Path(job.rows), job.template)

    arguments = start(job)
    trainer, tokenizer = load(job, rows, arguments, reporter)
    loaded = time.monotonic()
    reporter.say(f"training on {rows.height} rows, loaded in {loaded - STARTED:.1f} s")

    trainer.train()
    trained = time.monotonic()

    from training.model_folder import save

    losses = trainer.losses()
    facts = {
        "steps": len(losses),
        "rows": trainer.rows,
        "tokens": trainer.total_tokens(),
    }
    save(trainer, tokenizer, out)  # by all ranks
    finished = time.monotonic()
    last = losses[-max(1, len(losses) // 10) :]
    done = facts | {
        "final_loss": sum(last) / len(last),
        "losses": thinned(losses),
        "seconds": finished - STARTED,
        "load_seconds": loaded - STARTED,
        "train_seconds": trained - loaded,
        "save_seconds": finished - trained,
        "world_size": arguments.world_size,
    }
    if arguments.process_index == 0:
        mark_done(out, done)
    return done


def start(job: Job) -> TrainingArguments:
    """Starts the process group and asserts its size: launchers can silently start fewer processes."""
    import torch

    from training.trainer import training_arguments

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    arguments = training_arguments(
        job.training, out=job.out, seed=job.seed, cpu=cpu or not torch.accelerator.is_available()
    )
    if arguments.world_size != job.world_size:
        raise JobError(
            f"world_size: the job expects {job.world_size} processes, the launcher started "
            f"{arguments.world_size}; accelerate launch --cpu always starts one: use --multi_gpu with "
            "ACCELERATE_USE_CPU=true for several on a CPU"
        )
    return arguments


def load(
    job: Job, rows: Any, arguments: TrainingArguments, reporter: Reporter
) -> tuple[ObjectiveTrainer, PreTrainedTokenizerBase]:
    """Model, tokenizer, batches and the trainer that joins them."""
    from training.batches import Collator, Examples, plan_batches
    from training.examples import encode
    from training.model_folder import load_model, load_tokenizer
    from training.special_tokens import add_special_tokens, vocabulary_rows
    from training.trainer import ObjectiveTrainer

    settings = job.training
    tokenizer = load_tokenizer(job.policy)
    model = load_model(job.policy, job.dtype)
    known = len(tokenizer)
    try:
        added = add_special_tokens(
            model, tokenizer, job.special_tokens, settings.special_token_init, job.seed
        )
    except ValueError as error:
        raise JobError(f"training.special_token_init: {error}") from None
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and settings.max_length > positions:
        raise JobError(
            f"training.max_length: {settings.max_length}, but {job.policy} reads at most "
            f"{positions} tokens; lower it"
        )

    examples = encode(rows, tokenizer, job)
    if len(examples) < rows.height:
        reporter.say(
            f"{rows.height - len(examples)} of {rows.height} rows have an empty text and are left out"
        )
    plan = plan_batches(
        [example.length for example in examples],
        batch_size=settings.batch_size,
        accumulation=settings.gradient_accumulation,
        world_size=arguments.world_size,
        epochs=settings.epochs,
        seed=job.seed,
    )
    reference = None
    vocabulary = min([known, *added])
    if settings.objective.kl_coef > 0:
        assert job.reference is not None, "checked with the job"
        reference = load_model(job.reference, job.dtype)
        readable = vocabulary_rows(reference)
        if settings.objective.kl_reference_sees_condition and added and max(added) >= readable:
            raise JobError(
                f"training.objective.kl_reference_sees_condition: {job.reference} does not know the "
                f"special tokens {job.special_tokens}; set it to false"
            )
    trainer = ObjectiveTrainer(
        model=model,
        args=arguments,
        examples=Examples(examples),
        plan=plan,
        collator=Collator(pad=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0),
        settings=settings,
        vocabulary=vocabulary,
        reporter=reporter,
        reference=reference,
    )
    return trainer, tokenizer


def mark_done(out: Path, done: dict[str, Any]) -> None:
    """Writes done.json whole or not at all."""
    draft = out / f".{DONE}"
    draft.write_text(json.dumps(done, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    draft.replace(out / DONE)


def thinned(losses: list[float], points: int = 64) -> list[float]:
    """At most ``points`` means over equal stretches: the loss curve for a plot."""
    stretch = -(-len(losses) // points)
    return [
        sum(part) / len(part) for part in (losses[i : i + stretch] for i in range(0, len(losses), stretch))
    ]


if __name__ == "__main__":
    sys.exit(main())
