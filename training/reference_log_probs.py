"""The reference's log-probabilities of the examples: computed once before training, never in a step.

Those in a table keyed by the tokens of prompt and text (`tables.REFERENCE_LOG_PROBS`) are cached; only the
rest are computed, divided among the processes. New ones are written next to the policy, so that later
trainings with the same reference can reuse them.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import polars as pl
import torch
from transformers import PreTrainedModel, TrainingArguments

from textalign_dagster.tables import REFERENCE_LOG_PROBS
from training.data.batches import Collator
from training.data.examples import Example
from training.forward import labelled_tokens
from training.job import Job, JobError
from training.objectives.tokens import target_log_probs
from training.progress import Reporter


def tokens_hash(example: Example) -> str:
    """The key of a row of the table: a hash of the token ids of prompt and text."""
    prompt = example.prompt if example.reference is None else example.reference
    digest = hashlib.blake2b(digest_size=12)
    for ids in (prompt, example.text):
        digest.update(len(ids).to_bytes(8, "big"))
        digest.update(np.asarray(ids, np.int64).tobytes())
    return digest.hexdigest()


def read(path: Path) -> dict[str, list[float]]:
    """The cached values: tokens_hash → log-probability of each label.

    Raises:
        JobError: the file cannot be read.
    """
    try:
        rows = pl.read_parquet(path, columns=["tokens_hash", "log_probs"])
    except (pl.exceptions.PolarsError, OSError) as error:
        raise JobError(
            f"{path}: cannot be read as a table of log-probabilities ({error}); remove it"
        ) from None
    return dict(rows.iter_rows())


def tabulate(
    job: Job,
    table: tuple[str | None, str],
    model: PreTrainedModel,
    examples: list[Example],
    collator: Collator,
    arguments: TrainingArguments,
    reporter: Reporter,
) -> list[Example]:
    """The examples with their ``reference_log_probs``, cached or computed now.

    Args:
        table: the path of the cached ones, if any, and the name of the Parquet file for those computed now. Every
            process first writes its own part next to it.
        model: the reference.
    """
    assert job.beside is not None, "checked with the job"
    out = Path(job.beside) / table[1]
    out.parent.mkdir(parents=True, exist_ok=True)
    known = {} if table[0] is None else read(Path(table[0]))
    cast(Any, model).to(arguments.device)
    batch_size, rank, world_size = job.training.batch_size, arguments.process_index, arguments.world_size
    hashes = [tokens_hash(example) for example in examples]
    sequences = dict(zip(hashes, examples, strict=True))
    again = [replace(example, prompt=example.second or [], reference=None) for example in examples]
    seconds = [tokens_hash(example) if collator.apart else None for example in again]
    sequences |= {key: example for key, example in zip(seconds, again, strict=True) if key is not None}
    missing = {key: example for key, example in sequences.items() if key not in known}
    # Long rows first: running out of memory shows at once. Rows of similar length are read together.
    ordered = sorted(missing, key=lambda key: (-missing[key].length, key))
    batches = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    share = batches[rank::world_size]
    rows = []
    was_training = model.training
    model.eval()
    for done, batch in enumerate(share):
        rows += _log_probs(model, collator, batch, [missing[key] for key in batch])
        if done % 50 == 49:
            reporter.say(f"reference log-probs: {done + 1} of {len(share)} batches")
    model.train(was_training)
    own = pl.DataFrame(rows, REFERENCE_LOG_PROBS, orient="row")
    parts = [out.with_name(f"{out.stem}-{i}-of-{world_size}{out.suffix}") for i in range(world_size)]
    own.write_parquet(parts[rank])
    _wait()
    computed = pl.concat(pl.read_parquet(part) for part in parts)
    _wait()
    parts[rank].unlink()
    if rank == 0:
        computed.write_parquet(out)
        reporter.say(
            f"reference log-probs: {computed.height} computed, {len(sequences) - len(missing)} cached"
        )
    known |= dict(computed.select("tokens_hash", "log_probs").iter_rows())
    return [
        replace(
            example,
            reference_log_probs=known[key],
            second_reference_log_probs=None if second is None else known[second],
        )
        for key, second, example in zip(hashes, seconds, examples, strict=True)
    ]


@torch.no_grad()
def _log_probs(
    model: PreTrainedModel, collator: Collator, keys: list[str], examples: list[Example]
) -> list[tuple[None, str, str, float, list[float]]]:
    """Rows of the table for one batch; the policy's hash is not known here."""
    seen = [
        replace(e, prompt=e.prompt if e.reference is None else e.reference, second=None) for e in examples
    ]
    batch = replace(collator, apart=False)(seen)
    inputs = {
        name: value.to(model.device) if isinstance(value, torch.Tensor) else value
        for name, value in batch.items()
    }
    tokens = labelled_tokens(model, inputs, "")
    values = target_log_probs(tokens.log_probs, tokens.targets).double().cpu()
    lists = [part.tolist() for part in values.split(batch["counted"].tolist())]
    return [
        (None, key, example.sample_id, sum(part), part)
        for key, example, part in zip(keys, examples, lists, strict=True)
    ]


def _wait() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
