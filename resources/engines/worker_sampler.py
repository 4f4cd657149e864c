"""What all engines with worker processes have in common: calls, dealt to the workers and put together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from resources.engines.sampler import Adapted, Completion, Decoding, Model, Request, SamplerError
from resources.workers.channel import Channel, Progress
from resources.workers.shares import call_all, shares, together


class WorkerSampler:
    """A `sampler.Sampler` whose model is in worker processes; an engine defines how they are started.

    channels: one a worker; each has a copy of the model.
    """

    engine: str

    def __init__(self, channels: Iterable[Channel]) -> None:
        self.channels = list(channels)
        self.on_accelerator = False  # known once the workers have started
        self.load_seconds = 0.0
        self.serves_adapters = False  # beside the weights of a model

    def generate(
        self,
        model: Model,
        requests: Sequence[Request],
        decoding: Decoding,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """The completions of every request, in the order of requests and of their seeds.

        The same call on the same machine, with the same number of threads, gives the same
        completions. Among other requests, or on another machine, logits may differ in their last
        digits, and a sample with them once in many thousand tokens.
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
        """(log-probability of the text given the prompt, in nats; the text's tokens) of each pair.

        Neither the prompt's tokens nor an end token is counted; an empty text gives (0.0, 0).
        """
        calls = [
            {"op": "logprobs", "pairs": share, "total": len(share)}
            for share in shares(pairs, len(self.channels))
        ]
        return [(total, count) for total, count in self._rows(model, calls, progress)]

    def close(self) -> None:
        """End the workers; a later call starts others."""
        for channel in self.channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _rows(self, model: Model, calls: list[dict[str, Any]], progress: Progress | None) -> list[Any]:
        asked = [call for call in calls if call["total"]]
        if not asked:
            return []
        named = self._named(model)
        self._prepare(Path(named["model"]))
        used = self.channels[: len(asked)]
        try:
            results = call_all(used, [{**call, **named} for call in asked], progress)
            self.load_seconds += max(channel.load_seconds for channel in used)
        finally:
            ready = self.channels[0].ready
            elsewhere = self.channels[0].host is not None  # where an idle worker holds a node
            self.on_accelerator = ready is not None and (elsewhere or ready["device"] != "cpu")
        return together([self._rows_of(result) for result in results])

    def _named(self, model: Model) -> dict[str, str]:
        """How a call names a model."""
        if not isinstance(model, Adapted):
            return {"model": str(model_folder(model))}
        if not self.serves_adapters:
            raise SamplerError(
                f"engine {self.engine} was not started for adapters; set sampling.adapters to merged, or choose an "
                "engine that serves them"
            )
        return {"model": str(model_folder(model.base)), "adapter": str(adapter_folder(model.adapter))}

    def _prepare(self, folder: Path) -> None:
        """Whatever must be true of the workers before they are asked about a model."""

    def _rows_of(self, result: Any) -> list[Any]:
        """The rows in what a worker answered."""
        return list(result)


def model_folder(model: Path) -> Path:
    """The model's folder, absolute.

    Raises:
        SamplerError: it has no config.json.
    """
    folder = Path(model).absolute()
    if not (folder / "config.json").is_file():
        what = "has no config.json" if folder.is_dir() else "is not a folder"
        raise SamplerError(f"model {folder} {what}; give a folder that save_pretrained() wrote")
    return folder


def adapter_folder(adapter: Path) -> Path:
    """An adapter's folder, absolute.

    Raises:
        SamplerError: it is not what peft writes, without pickle.
    """
    folder = Path(adapter).absolute()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            what = f"has no {name}" if folder.is_dir() else "is not a folder"
            raise SamplerError(f"adapter {folder} {what}; train the checkpoint again")
    return folder
