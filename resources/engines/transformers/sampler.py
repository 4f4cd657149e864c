"""The embedded engine: transformers in its own worker process. This side does not import torch.

    with TransformersSampler() as sampler:
        sampler.generate(Path("policy"), [Request("def f(x):", (1, 2))], Decoding(temperature=1))

The worker starts on the first call, serves any number of calls, holds one model at a time, and exits,
freeing its memory, when the sampler is closed, a call is interrupted, or this process dies.
"""

from __future__ import annotations

import importlib.metadata
from typing import Literal

from resources.engines.sampler import SamplerError
from resources.engines.worker_sampler import WorkerSampler
from resources.workers.channel import Channel
from resources.workers.host import Host

LOOP_VERSION = 1  # increase with any change after which a seed yields a different sample


class TransformersSampler(WorkerSampler):
    """Samples from transformers causal language models, and scores texts with them; see `sampler.Sampler`.

    dtype: number format of the weights ("float32", "bfloat16", "float16").
    device: "auto" (a GPU if torch sees one), "cpu", "cuda", "cuda:1", …
    batch_size: sequences decoded together; bounds memory use.
    threads: torch's threads; None: OMP_NUM_THREADS if set, else the processors available to this process.
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
            raise ValueError(f"dtype is {dtype!r}; use float32, bfloat16 or float16")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; use 1 or more")
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
        versions = "+".join(f"{name}-{_version(name)}" for name in names)
        return f"{versions}+loop-{LOOP_VERSION}+{self.settings['dtype']}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise SamplerError(f"{name} is not installed; pip install {name}") from None
