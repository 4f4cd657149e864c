"""LoRA adapters on running vLLM servers: requests name them as their model; the servers' weights do not change.

Such a server is started with --enable-lora, --lora-target-modules and VLLM_ALLOW_RUNTIME_LORA_UPDATING. An
adapter's name is derived from its content, so no two adapters share one; earlier adapters are unloaded.
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
    """An adapter's folder and the name under which servers load it."""

    folder: Path
    name: str

    @classmethod
    def of(cls, folder: Path) -> Adapter:
        return cls(folder, PREFIX + content_of(folder))


async def takes_adapters(server: Server) -> None:
    """Check that a server can load adapters at all, before there is one.

    Raises:
        ServerFault: it cannot; others may.
    """
    try:
        supported = await server.get("/v1/load_lora_adapter") is not None
    except Refused:  # the path exists, but not for GET
        supported = True
    if not supported:
        raise ServerFault(f"it takes no adapters; {REMEDY}", gone=False)


async def have_adapter(server: Server, adapter: Adapter) -> None:
    """Ensure that a server has loaded an adapter; sets the server's ``model``.

    Raises:
        ServerFault: it refuses the adapter, with a reason; others may accept it.
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
    """Reload an adapter into a server."""
    await server.tell("/v1/unload_lora_adapter", {"lora_name": adapter.name})
    await _load(server, adapter)
    await server.post("/reset_prefix_cache")  # it is keyed by the adapter's name


async def _load(server: Server, adapter: Adapter) -> None:
    body = {"lora_name": adapter.name, "lora_path": str(adapter.folder)}
    if not await server.tell("/v1/load_lora_adapter", body):
        raise ServerFault(
            f"it takes no adapters, or {adapter.folder} does not exist there; {REMEDY}", gone=False
        )
