"""Train a policy on the rows of a job.

    accelerate launch --num_processes 1 … -m training.train JOB.json

Writes the job's ``out`` folder: model.safetensors, config.json, generation_config.json, the
tokenizer, and last ``done.json`` {steps, rows, tokens, tokens_per_s, final_loss, losses, seconds:
{load, train, save}, first_step_seconds (part of train), resumed_at, earlier_seconds (of train, before
that), world_size, accelerators, peak_memory, parameters, trained_parameters, coefficients, measured}. Without that
file the folder is not a checkpoint. Nothing is evaluated here. On the CPU two runs of one job give the
same bytes, even if one of them was interrupted and resumed from a snapshot (training/state/snapshots.py).
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

from training.job import REFERENCE_TABLE, Job, JobError, TrainingError, read_job  # noqa: E402 (the clock starts first)
from training.progress import Reporter, open_reporter  # noqa: E402
from training.settings import DEFAULT_LENGTH  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

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
            leave()
    except TrainingError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def run(job: Job, reporter: Reporter) -> dict[str, Any]:
    """Loads, trains, saves; returns the content of done.json.

    Raises:
        JobError: bad input, before any training; or out of memory.
        NonFiniteError: the loss or a weight is no longer finite; nothing is saved.
    """
    from training.data.examples import read_rows
    from training.memory import enough_memory

    out = Path(job.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / DONE).unlink(missing_ok=True)
    rows = read_rows(Path(job.rows), job.template, job.training.objective.needs)

    arguments = start(job)
    with enough_memory(job):
        trainer, tokenizer = load(job, rows, arguments, reporter)
        loaded = time.monotonic()
        reporter.say(f"training on {rows.height} rows, loaded in {loaded - STARTED:.1f} s")
        if trainer.before.step:
            reporter.say(f"resuming from the snapshot of step {trainer.before.step}")
        trainer.train()
    trained = time.monotonic()

    from training.state.model_folder import save

    progress = trainer.progress()
    facts = {
        "steps": progress.step,
        "rows": trainer.rows,
        "tokens": progress.tokens,
        "tokens_per_s": progress.tokens / max(progress.seconds, 1e-9),
        "resumed_at": list(progress.resumed_at),
        "earlier_seconds": trainer.before.seconds,
        "coefficients": progress.coefficients,
        "measured": trainer.measured | trainer.weighing,
        **trainer.sizes,
        "peak_memory": trainer.peak_memory(),
    }
    beside = None if job.beside is None else Path(job.beside)
    save(trainer, tokenizer, out, beside)  # on all ranks
    finished = time.monotonic()
    losses = list(progress.losses)
    last = losses[-max(1, len(losses) // 10) :]
    done = facts | {
        "final_loss": sum(last) / len(last),
        "losses": thinned(losses),
        "seconds": {"load": loaded - STARTED, "train": progress.seconds, "save": finished - trained},
        "first_step_seconds": trainer.first_step_seconds,
        "world_size": arguments.world_size,
        "accelerators": 0 if arguments.device.type == "cpu" else arguments.world_size,
    }
    if arguments.process_index == 0:
        mark_done(out, done)
    return done


def start(job: Job) -> TrainingArguments:
    """Starts the process group and checks its size: launchers can silently start fewer processes."""
    import torch

    from training.trainer import training_arguments

    if job.threads is not None:
        torch.set_num_threads(job.threads)
    cpu = _is_set("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    deepspeed = _is_set("ACCELERATE_USE_DEEPSPEED")
    if cpu and deepspeed:
        _deepspeed_on_cpu()
    arguments = training_arguments(job.training, out=job.out, seed=job.seed, cpu=cpu, deepspeed=deepspeed)
    if deepspeed:
        # Otherwise from_pretrained shards weights as it loads them (ZeRO-3): a reference would stay
        # sharded, and new tokens could not be added. The policy is sharded when training starts.
        from transformers.integrations.deepspeed import unset_hf_deepspeed_config

        unset_hf_deepspeed_config()
    if arguments.world_size != job.world_size:
        raise JobError(
            f"world_size: the job expects {job.world_size} processes, the launcher started "
            f"{arguments.world_size}; accelerate launch --cpu always starts one: use --multi_gpu with "
            "ACCELERATE_USE_CPU=true for several on a CPU"
        )
    return arguments


def leave() -> None:
    """Destroys the process group, if any: exiting with it open can abort, because its threads are still running."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def _deepspeed_on_cpu() -> None:
    """Plain gloo between processes: DeepSpeed's own shared-memory backend would have to be compiled first."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def load(
    job: Job, rows: Any, arguments: TrainingArguments, reporter: Reporter
) -> tuple[ObjectiveTrainer, PreTrainedTokenizerBase]:
    """Loads model, tokenizer and batches; returns the trainer that combines them, and the tokenizer."""
    from training.data.batches import Collator, Examples, plan_batches
    from training.data.examples import encode
    from training.data.special_tokens import add_special_tokens, vocabulary_rows
    from training.freezing import train_last_blocks
    from training.state.model_folder import load_model, load_reward_model, load_tokenizer
    from training.state.optimizer_state import OptimizerState
    from training.state.snapshots import Snapshots, identity
    from training.trainer import ObjectiveTrainer

    settings = job.training
    tokenizer = load_tokenizer(job.policy)
    scores = "score head" in settings.objective.needs
    if scores and tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    padding = tokenizer.pad_token_id or 0
    if scores:
        model = load_reward_model(job.policy, job.dtype, padding, job.seed)
    else:
        model = load_model(job.policy, job.dtype)
    known, known_rows = len(tokenizer), vocabulary_rows(model)
    try:
        added = add_special_tokens(
            model, tokenizer, job.special_tokens, settings.special_token_init, job.seed
        )
    except ValueError as error:
        raise JobError(f"training.special_token_init: {error}") from None
    if settings.trainable_layers is not None:
        try:
            train_last_blocks(model, settings.trainable_layers)
        except ValueError as error:
            raise JobError(f"training.trainable_layers: {error}") from None
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = settings.max_length or min(DEFAULT_LENGTH, positions or DEFAULT_LENGTH)
    if positions is not None and longest > positions:
        raise JobError(
            f"training.max_length: {longest}, but {job.policy} reads at most {positions} tokens; lower it"
        )

    if settings.block is not None:
        from training.data.blocks import blocks, start_with_end

        if positions is not None and settings.block > positions:
            raise JobError(
                f"training.block: {settings.block}, but {job.policy} reads at most {positions} tokens; lower it"
            )
        examples = blocks(rows, tokenizer, job)
        start_with_end(tokenizer)
        reporter.say(f"{rows.height} documents in {len(examples)} blocks of {settings.block} tokens")
    else:
        examples = encode(rows, tokenizer, job, longest)
        if len(examples) < rows.height:
            reporter.say(
                f"{rows.height - len(examples)} of {rows.height} rows have an empty text and are left out"
            )
    try:
        plan = plan_batches(
            [example.length for example in examples],
            [example.group for example in examples],
            batch_size=settings.batch_size,
            accumulation=settings.gradient_accumulation,
            world_size=arguments.world_size,
            epochs=settings.epochs,
            seed=job.seed,
        )
    except ValueError as error:
        raise JobError(f"training.batch_size: {settings.batch_size}: {error}") from None
    objective, reference = settings.objective, None
    vocabulary = min([known, *added])
    if objective.reference_policy is not None:
        assert job.reference is not None, "checked with the job"
        # The policy before its first step, or without its adapter, is its own reference: no second copy is needed.
        if not (job.is_own_reference and (settings.lora is not None or "reference" not in objective.needs)):
            reference = load_model(job.reference, job.dtype)
        readable = known_rows if reference is None else vocabulary_rows(reference)
        if objective.reference_sees_condition and added and max(added) >= readable:
            raise JobError(
                f"training.objective: its reference reads the condition, but {job.reference} does not know the "
                f"special tokens {job.special_tokens}; let it read the bare prompt (kl_reference_sees_condition: "
                "false), or choose another objective"
            )
    if "value head" in objective.needs:
        from training.value_head import attach

        attach(model, objective.detaches_value, None if job.optimizer is None else Path(job.optimizer))
    if settings.packing:
        _pack(job, model, reference, reporter)
    collator = Collator(
        pad=padding,
        packed=settings.packing,
        apart="mismatched" in objective.needs,
    )
    encoded, reference_model = examples, reference
    if "reference log-probs" in objective.needs:
        from training.reference_log_probs import tabulate

        table = job.reference_log_probs, REFERENCE_TABLE
        examples = tabulate(job, table, reference or model, examples, collator, arguments, reporter)
        reference = None  # not needed by any step
    carried = None if job.optimizer is None else OptimizerState.read(Path(job.optimizer))
    if settings.lora is not None:
        from training.lora import add_adapter, continue_adapter

        if job.adapter is None:
            model = add_adapter(model, settings.lora, added, job.seed)
        else:
            model = continue_adapter(model, settings.lora, added, Path(job.adapter))
    ratios: dict[str, float] = {}
    if settings.density_ratio is not None:
        from training.density_ratio import reweigh

        examples, ratios = reweigh(job, model, examples, collator, arguments, reporter)
    snapshots = None
    if job.sharing == "FSDP":
        reporter.say("FSDP keeps optimizer state in its own format: no snapshots are taken")
    elif job.snapshots is not None and settings.snapshot_minutes is not None:
        training = identity(job, [model, reference_model], encoded)
        snapshots = Snapshots(
            Path(job.snapshots), training, settings.snapshot_minutes, reporter, arguments.device
        )
    del reference_model
    trainer = ObjectiveTrainer(
        model=model,
        args=arguments,
        examples=Examples(examples),
        plan=plan,
        collator=collator,
        settings=settings,
        vocabulary=vocabulary,
        reporter=reporter,
        reference=reference,
        carried=carried,
        snapshots=snapshots,
    )
    trainer.weighing = ratios
    started = trainer.accelerator.distributed_type.name
    if job.sharing is not None and started != job.sharing:
        raise JobError(
            f"sharing: the job expects {job.sharing}, accelerate started {started}; launch it with its accelerate "
            "configuration, and without ACCELERATE_USE_CPU"
        )
    return trainer, tokenizer


def _pack(job: Job, model: PreTrainedModel, reference: PreTrainedModel | None, reporter: Reporter) -> None:
    """Makes sure that policy and reference can read packed rows."""
    from training.data.packing import prepare

    row_by_row = prepare(model, job.policy)
    if reference is not None:
        prepare(reference, str(job.reference))
    if not row_by_row:
        reporter.say(
            f"training.packing: the attention of a {type(model).__name__} runs over all rows at once, which can cost "
            "more than the padding it saves"
        )


def mark_done(out: Path, done: dict[str, Any]) -> None:
    """Writes done.json atomically."""
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
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Shutting torch down takes 1.5 s, and can abort while its threads still run; everything is written by now.
    os._exit(code)
