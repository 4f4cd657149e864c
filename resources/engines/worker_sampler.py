"""What all engines with worker processes share: calls are split among the workers, and results merged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from resources.engines.sampler import Adapted, Completion, Decoding, Model, Request, SamplerError
from resources.workers.channel import Channel, Progress
from resources.workers.shares import call_all, shares, together


class WorkerSampler:
    """A `sampler.Sampler` whose model is in worker processes; a subclass defines how they are started.

    channels: one per worker; each worker has a copy of the model.
    """

    engine: str

    def __init__(self, channels: Iterable[Channel]) -> None:
        self.channels = list(channels)
        self.on_accelerator = False  # known once the workers have started
        self.load_seconds = 0.0
        self.serves_adapters = False  # LoRA adapters on top of a model's weights

    def generate(
        self,
        model: Model,
        requests: Sequence[Request],
        decoding: Decoding,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """The completions of every request, in the order of requests and of their seeds.

        The same call on the same machine, with the same number of threads, gives the same
        completions. With other requests in the call, or on another machine, logits may differ in their
        last digits, which changes a sample about once in many thousand tokens.
        """
        calls = [
            {
                "op": "generate",
                "requests": [(request.prompt, request.seeds) for request in share],
                "decoding": asdict(decoding),
                "total": sum(len(request.seeds) for request in share),
            }
            for share in shares(requests, len(self.channels))
        ]
        return [[Completion(**one) for one in row] for row in self._rows(model, calls, progress)]

    def logprobs(
        self,
        model: Model,
        pairs: Sequence[tuple[str, str]],
        progress: Progress | None = None,
    ) -> list[tuple[float, int]]:
        """For each pair: log-probability of the text given the prompt, in nats; number of its tokens.

        Neither the prompt's tokens nor an end token is counted; an empty text gives (0.0, 0).
        """
        calls = [
            {"op": "logprobs", "pairs": share, "total": len(share)}
            for share in shares(pairs, len(self.channels))
        ]
        return [(total, count) for total, count in self._rows(model, calls, progress)]

    def close(self) -> None:
        """Stop the workers; a later call starts new ones."""
        for channel in self.channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _rows(self, model: Model, calls: list[dict[str, Any]], progress: Progress | None) -> list[Any]:
        pending = [call for call in calls if call["total"]]
        if not pending:
            return []
        named = self._named(model)
        self._prepare(Path(named["model"]))
        used = self.channels[: len(pending)]
        try:
            results = call_all(used, [{**call, **named} for call in pending], progress)
            self.load_seconds += max(channel.load_seconds for channel in used)
        finally:
            ready = self.channels[0].ready
            elsewhere = self.channels[0].host is not None  # where even an idle worker occupies a node
            self.on_accelerator = ready is not None and (elsewhere or ready["device"] != "cpu")
        return together([self._rows_of(result) for result in results])

    def _named(self, model: Model) -> dict[str, str]:
        """The fields with which a call names a model."""
        if not isinstance(model, Adapted):
            return {"model": str(model_folder(model))}
        if not self.serves_adapters:
            raise SamplerError(
                f"engine {self.engine} was not started for adapters; set sampling.adapters to merged, or choose an "
                "engine that serves them"
            )
        return {"model": str(model_folder(model.base)), "adapter": str(adapter_folder(model.adapter))}

    def _prepare(self, folder: Path) -> None:
        """Make the workers ready for calls about a model."""

    def _rows_of(self, result: Any) -> list[Any]:
        """The rows in a worker's result."""
        return list(result)


def model_folder(model: Path) -> Path:
    """The absolute path of a model's folder.

    Raises:
        SamplerError: it has no config.json.
    """
    folder = Path(model).absolute()
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise SamplerError(f"model {folder} {what}; use a folder that save_pretrained() wrote")
    return folder


def adapter_folder(adapter: Path) -> Path:
    """The absolute path of an adapter's folder.

    Raises:
        SamplerError: it lacks one of the files that peft writes (safetensors only).
    """
    folder = Path(adapter).absolute()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            what = f"has no {name}" if folder.is_dir() else "is not a folder"
            raise SamplerError(f"adapter {folder} {what}; train the checkpoint again")
    return folder
