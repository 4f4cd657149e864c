"""LoRA adapters in a vLLM engine in this process: on top of its weights, never merged into them.

An engine must be started with adapter support. It holds one adapter at a time; the next one replaces it
quickly and without touching the weights, and the model without an adapter remains available.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resources.workers.serving import CallError, reason, version_of
from textalign_dagster.settings.sampling import HIGHEST_RANK

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, HIGHEST_RANK)
"""The ranks that an engine can be built for; adapters of a lower rank fit."""
FILES = ("adapter_config.json", "adapter_model.safetensors")


def options(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """vLLM's arguments for serving adapters on top of a folder's model; empty if it serves none."""
    rank = settings["max_lora_rank"]
    if rank is None:
        return {}
    modules: Sequence[str] = settings["lora_modules"]
    if isinstance(modules, str):  # all-linear
        modules = linear_modules(folder, settings["trust_remote_code"])
    return {
        "enable_lora": True,
        "max_loras": 1,
        "max_cpu_loras": 1,  # the previous one is evicted
        "max_lora_rank": next(one for one in RANKS if rank <= one),
        # Not every module that vLLM supports: on an output head it treats the positions of a prompt whose
        # log-probabilities are requested as that many requests, and fails.
        "lora_target_modules": sorted({name.rpartition(".")[2] for name in modules}),
    }


def linear_modules(folder: Path, trust_remote_code: bool) -> list[str]:
    """Names of the linear modules of a folder's model, except its output head: peft's "all-linear"."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.pytorch_utils import Conv1D

    config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear | Conv1D) and module is not head
        }
    )


class Adapters:
    """The adapters that an engine has been given, each with a unique name and number."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}  # by name
        self.identity: object = None  # of the last one's files
        self.last: Any = None  # vLLM's request for it

    def request(self, llm: Any, folder: Path) -> Any:
        """vLLM's LoRA request for the adapter of a folder, which is loaded into the engine.

        Raises:
            CallError: vLLM cannot serve it.
        """
        from vllm.lora.request import LoRARequest

        identity = version_of(folder)
        if self.last is not None and identity == self.identity:
            return self.last
        self.last = None
        try:
            # vLLM keys its prefix cache by the name, and its loaded adapters by the number.
            name = content_of(folder)
            number = self.numbers.setdefault(name, len(self.numbers) + 1)
            request = LoRARequest(name, number, str(folder))
            llm.llm_engine.add_lora(request)
            left_out = sorted(
                {one for found in llm.collective_rpc(unserved, args=(number,)) for one in found}
            )
        except Exception as error:  # peft's files, vLLM's limits and its workers raise many types
            raise CallError(
                f"vLLM cannot serve the adapter {folder} ({reason(error)}); set sampling.adapters to merged"
            ) from error
        if left_out:
            raise CallError(
                f"vLLM would leave out parts of the adapter {folder} ({', '.join(left_out[:3])}, …); set "
                "sampling.adapters to merged"
            )
        self.identity, self.last = identity, request
        return request

    def forget(self) -> None:
        """Call when the engine has other weights: the adapter must be loaded again."""
        self.last = None


def unserved(worker: Any, number: int) -> list[str]:
    """The modules that an adapter targets but a vLLM worker leaves out, which vLLM does not report."""
    manager = worker.get_model().lora_manager
    return sorted(set(manager.get_adapter(number).loras).difference(manager.modules))


def content_of(folder: Path) -> str:
    """A hash of the content of an adapter's files."""
    hashed = hashlib.sha256()
    for name in FILES:
        with (folder / name).open("rb") as stream:
            hashed.update(hashlib.file_digest(stream, "sha256").digest())
    return hashed.hexdigest()
