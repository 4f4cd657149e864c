"""Out of memory: one sentence instead of a traceback through the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from training.job import Job, JobError
from training.settings import DEFAULT_LENGTH


@contextmanager
def enough_memory(job: Job) -> Iterator[None]:
    """Turns running out of memory inside the block into an error that names the settings that help.

    Raises:
        JobError: an accelerator or this machine is out of memory.
    """
    import torch

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        on_gpu = isinstance(error, torch.OutOfMemoryError)
        if not on_gpu and not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        settings = job.training
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        where = "the accelerator" if on_gpu else "this machine"
        remedies = [
            f"lower training.batch_size ({settings.batch_size}) and raise training.gradient_accumulation"
            if settings.batch_size > 1
            else f"lower training.max_length ({settings.max_length or DEFAULT_LENGTH})",
            *(["set training.gradient_checkpointing"] if not settings.gradient_checkpointing else []),
            *(["train adapters (training.lora)"] if settings.lora is None else []),
            *(["shard it (training.accelerate: zero2_offload, zero3)"] if job.sharing is None else []),
        ]
        raise JobError(
            f"out of memory: {where} has too little for this training ({reason[:200]}); "
            + ", or ".join(remedies)
        ) from error
