"""The embedded engine: transformers in a worker process of its own. This side imports no torch.

    with TransformersSampler() as sampler:
        sampler.generate(Path("policy"), [Request("def f(x):", (1, 2))], Decoding(temperature=1))

The worker starts with the first call, serves any number of them, holds one model at a time, and is
gone, with its memory, when the sampler is closed, a call is interrupted, or this process dies.
"""

from __future__ import annotations

import importlib.metadata
from typing import Literal

from resources.engines.sampler import SamplerError
from resources.engines.worker_sampler import WorkerSampler
from resources.workers.channel import Channel
from resources.workers.host import Host

LOOP_VERSION = 1  # to be raised with any change after which a seed gives another sample


class TransformersSampler(WorkerSampler):
    """Samples from, and scores under, transformers causal language models; see `sampler.Sampler`.

    dtype: number format of the weights ("float32", "bfloat16", "float16").
    device: "auto" (a GPU if torch sees one), "cpu", "cuda", "cuda:1", …
    batch_size: sequences decoded together; it bounds the memory.
    threads: torch's threads; None is OMP_NUM_THREADS if set, else the processors of this process.
    host: where the worker runs; None: on this machine.
    """

    engine = "transformers"

    def __init__(
        self,
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        device: str = "auto",
        batch_size: int = 256,
        threads: int | None = None,
        trust_remote_code: bool = False,
        host: Host | None = None,
    ) -> None:
        if dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype is {dtype!r}; give float32, bfloat16 or float16")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give 1 or more")
        self.settings = {
            "dtype": dtype,
            "device": device,
            "batch_size": batch_size,
            "trust_remote_code": trust_remote_code,
        }
        channel = Channel(
            "resources.engines.transformers.worker",
            self.settings,
            error=SamplerError,
            what="sampling worker",
            threads=threads,
            offline=not trust_remote_code,  # models are local folders
            host=host,
        )
        super().__init__([channel])

    @property
    def engine_version(self) -> str:
        """Versions of everything that a sample depends on, number format included."""
        names = ("transformers", "tokenizers", "torch")
        found = "+".join(f"{name}-{_version(name)}" for name in names)
        return f"{found}+loop-{LOOP_VERSION}+{self.settings['dtype']}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise SamplerError(f"{name} is not installed; pip install {name}") from None
