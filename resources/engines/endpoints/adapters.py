"""LoRA adapters on running vLLM servers: requests name them as their model; the servers' weights stay.

A server for them is started with --enable-lora, --lora-target-modules and VLLM_ALLOW_RUNTIME_LORA_UPDATING. What
an adapter is called follows from its content, so that a name never stands for two; those of before are taken back.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from resources.engines.endpoints.servers import Refused, Server, ServerFault
from resources.engines.vllm.adapters import content_of

PREFIX = "adapter-"
REMEDY = (
    "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment, --enable-lora, --max-lora-rank and "
    "--lora-target-modules (docs/sampling.md)"
)


@dataclass(frozen=True)
class Adapter:
    """An adapter's folder and the name under which servers have it."""

    folder: Path
    name: str

    @classmethod
    def of(cls, folder: Path) -> Adapter:
        return cls(folder, PREFIX + content_of(folder))


async def takes_adapters(server: Server) -> None:
    """See to it that a server can be given adapters at all; asked before there is one.

    Raises:
        ServerFault: it cannot; others may.
    """
    try:
        there = await server.get("/v1/load_lora_adapter") is not None
    except Refused:  # it is there, for something else than a look
        there = True
    if not there:
        raise ServerFault(f"it takes no adapters; {REMEDY}", gone=False)


async def have_adapter(server: Server, adapter: Adapter) -> None:
    """See to it that a server has an adapter beside its weights; sets the server's ``model``.

    Raises:
        ServerFault: it refuses it, with a reason; others may accept it.
    """
    served = await server.get("/v1/models")
    names = [str(entry["id"]) for entry in served["data"] if entry.get("parent") is not None]
    if adapter.name not in names:
        for name in names:
            if name.startswith(PREFIX):
                await server.tell("/v1/unload_lora_adapter", {"lora_name": name})
        await _load(server, adapter)
    server.model = adapter.name


async def give_adapter(server: Server, adapter: Adapter) -> None:
    """Loads an adapter into a server, which confirms it."""
    await server.tell("/v1/unload_lora_adapter", {"lora_name": adapter.name})
    await _load(server, adapter)
    await server.post("/reset_prefix_cache")  # known by name


async def _load(server: Server, adapter: Adapter) -> None:
    body = {"lora_name": adapter.name, "lora_path": str(adapter.folder)}
    if not await server.tell("/v1/load_lora_adapter", body):
        raise ServerFault(
            f"it takes no adapters, or {adapter.folder} is not there for it; {REMEDY}", gone=False
        )
