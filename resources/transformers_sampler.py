"""The embedded engine: transformers in a worker process of its own. This side imports no torch.

    with TransformersSampler() as sampler:
        sampler.generate(Path("policy"), [Request("def f(x):", (1, 2))], Decoding(temperature=1))

The worker starts with the first call, serves any number of them, holds one model at a time, and is
gone, with its memory, when the sampler is closed, a call is interrupted, or this process dies.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from resources.sampler import Completion, Decoding, Progress, Request, SamplerError
from resources.worker import Channel

LOOP_VERSION = 1  # to be raised with any change after which a seed gives another sample


class TransformersSampler:
    """Samples from, and scores under, transformers causal language models; see `sampler.Sampler`.

    dtype: number format of the weights ("float32", "bfloat16", "float16").
    device: "auto" (a GPU if torch sees one), "cpu", "cuda", "cuda:1", …
    batch_size: sequences decoded together; it bounds the memory.
    threads: torch's threads; None is OMP_NUM_THREADS if set, else the processors of this process.
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
        self.on_accelerator = False  # known once the worker has started
        self.channel = Channel(
            "transformers_worker",
            self.settings,
            error=SamplerError,
            what="sampling worker",
            threads=threads,
            offline=not trust_remote_code,  # models are local folders
        )

    @property
    def engine_version(self) -> str:
        """Versions of everything that a sample depends on, number format included."""
        names = ("transformers", "tokenizers", "torch")
        found = "+".join(f"{name}-{_version(name)}" for name in names)
        return f"{found}+loop-{LOOP_VERSION}+{self.settings['dtype']}"

    def generate(
        self,
        model: Path,
        requests: Sequence[Request],
        decoding: Decoding,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """The completions of every request, in the order of requests and of their seeds.

        The same call on the same machine, with the same number of threads, gives the same
        completions. In another batch, or on another machine, logits may differ in their last
        digits, and a sample with them once in many thousand tokens.
        """
        if not requests:
            return []
        rows = self._call(
            {
                "op": "generate",
                "model": str(_folder(model)),
                "requests": [(request.prompt, request.seeds) for request in requests],
                "decoding": asdict(decoding),
                "total": sum(len(request.seeds) for request in requests),
            },
            progress,
        )
        return [[Completion(**one) for one in row] for row in rows]

    def logprobs(
        self,
        model: Path,
        pairs: Sequence[tuple[str, str]],
        progress: Progress | None = None,
    ) -> list[tuple[float, int]]:
        """(log-probability of the text given the prompt, in nats; the text's tokens) of each pair.

        Neither the prompt's tokens nor an end token is counted; an empty text gives (0.0, 0).
        """
        if not pairs:
            return []
        call = {
            "op": "logprobs",
            "model": str(_folder(model)),
            "pairs": list(pairs),
            "total": len(pairs),
        }
        return [(total, count) for total, count in self._call(call, progress)]

    def close(self) -> None:
        """End the worker; a later call starts another."""
        self.channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _call(self, call: dict[str, Any], progress: Progress | None) -> list[Any]:
        try:
            return list(self.channel.call(call, progress))
        finally:
            ready = self.channel.ready
            self.on_accelerator = ready is not None and ready["device"] != "cpu"


def _folder(model: Path) -> Path:
    folder = Path(model).absolute()
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise SamplerError(f"model {folder} {what}; give a folder that save_pretrained() wrote")
    return folder


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise SamplerError(f"{name} is not installed; pip install {name}") from None
