"""The policy behind servers: what tokenises its text, and whether every server has its weights."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Any

from resources.engines.endpoints.adapters import Adapter, give_adapter, have_adapter, takes_adapters
from resources.engines.endpoints.servers import EndpointError, Endpoints, Server, ServerFault
from resources.engines.endpoints.weights import (
    ALIKE,
    APART,
    PROBED,
    TEXT,
    apart,
    give,
    have,
    label_of,
    probe,
    reference,
    still_has,
)
from resources.engines.text import check_embeddings
from resources.engines.vllm.requests import end_ids_of
from resources.workers.serving import CallError, reason, version_of


class Engine:
    """What is known of the policy, and of the servers that should have its weights."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.identity: object = None
        self.folder, self.label = Path(), ""
        self.tokenizer: Any = None
        self.end_ids: tuple[int, ...] = ()
        self.outputs = 0  # number of logits
        self.context = 0  # tokens of a prompt and its completion
        self.probed: list[int] = []
        self.expected: list[float] | None = None  # log-probabilities of the probe, by transformers
        # By server and policy: its log-probs of the probe.
        self.known: dict[tuple[str, str], list[float]] = {}
        self.said: dict[str, list[float]] = {}  # by server: the same, at the start of this call
        self.adapter: Adapter | None = None  # on top of the weights
        self._adapter: object = None  # version of its files
        self.taking: set[str] = set()  # servers that accept adapters

    def read(self, folder: Path, adapter: Path | None = None) -> None:
        """Load what this side needs of a policy: tokenizer, config, and the adapter's name."""
        found = None if adapter is None else version_of(adapter)
        if found != self._adapter:
            self.adapter = None if adapter is None else Adapter.of(adapter)
            self._adapter, self.expected = found, None
        self._read(folder)

    @property
    def policy(self) -> str:
        """A name for the model that is sampled from, adapter included."""
        return self.label if self.adapter is None else f"{self.label}+{self.adapter.name}"

    def _read(self, folder: Path) -> None:
        from transformers import AutoConfig, AutoTokenizer

        from textalign_dagster import tokenisation

        identity = version_of(folder)
        if identity == self.identity:
            return
        self.identity = None
        trusted = self.settings["trust_remote_code"]
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trusted)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=trusted)
            self.outputs = int(config.get_text_config(decoder=True).vocab_size)
        except Exception as error:
            raise CallError(f"tokenizer or config of {folder} cannot be loaded ({reason(error)})") from error
        check_embeddings(folder, self.tokenizer, self.outputs)
        self.end_ids = end_ids_of(folder, self.tokenizer)
        self.probed = tokenisation.encode_prompts(self.tokenizer, [TEXT])[0][:PROBED]
        self.expected = None
        self.label, self.folder, self.identity = label_of(folder, identity), folder, identity

    async def use(self, endpoints: Endpoints) -> None:
        """Ensure that every server has the policy's weights.

        Raises:
            EndpointError: no server can load them, or one has different weights.
        """
        log_probs: dict[str, list[float]] = {}

        async def prepare(server: Server) -> None:
            await have(server, self.folder, self.label)
            if self.settings["adapters"] and server.url not in self.taking:
                await takes_adapters(server)
                self.taking.add(server.url)
            if self.adapter is not None:
                await have_adapter(server, self.adapter)
            log_probs[server.url] = await probe(server, self.probed)
            if self._changed(server.url, log_probs[server.url]):  # weights changed under the same name
                with contextlib.suppress(ServerFault):  # it accepts no weights: reported below
                    await give(server, self.folder, self.label)
                with contextlib.suppress(ServerFault):
                    if self.adapter is not None:
                        await give_adapter(server, self.adapter)
                    log_probs[server.url] = await probe(server, self.probed)

        if self.settings["verify"] and self.expected is None:
            arguments = (self.folder, self.settings["dtype"], self.settings["trust_remote_code"], self.probed)
            adapter = None if self.adapter is None else self.adapter.folder
            self.expected = await asyncio.to_thread(reference, *arguments, adapter)
        await endpoints.each(prepare)
        if not endpoints.live:
            raise endpoints.nobody()
        live = [server.url for server in endpoints.live]
        for url in live:
            for other in (log_probs[live[0]], *([self.expected] if self.expected else [])):
                if apart(log_probs[url], other) > APART[self.settings["dtype"]]:
                    raise EndpointError(
                        f"{url} does not have the weights of {self.folder}, or not in {self.settings['dtype']}: it "
                        f"finds a text {apart(log_probs[url], other):.2g} nats per token more or less likely than "
                        f"{'transformers' if other is self.expected else live[0]} does; start it with --dtype "
                        f"{self.settings['dtype']} (policy.dtype), let no one else change its weights, and use a "
                        "GPU for models with tied embeddings (on a CPU, vLLM keeps their old output head)"
                    )
        self.known |= {(url, self.policy): log_probs[url] for url in live}
        self.context, self.said = min(server.room for server in endpoints.live), log_probs

    async def unchanged(self, endpoints: Endpoints) -> None:
        """Check that every live server still has the weights it had when this call began.

        Raises:
            EndpointError: one does not.
        """

        async def again(server: Server) -> None:
            same = await still_has(server, self.label)
            now = await probe(server, self.probed)
            if not same or apart(self.said[server.url], now) > ALIKE[self.settings["dtype"]]:
                raise EndpointError(
                    f"the weights of {server.url} were changed while it sampled from {self.folder}: its output "
                    "is discarded; let only one experiment at a time use a server, and run this again"
                )

        await endpoints.each(again)

    def _changed(self, url: str, log_probs: list[float]) -> bool:
        """Whether log-probs rule out that a server has the weights it had under this name, or the policy's."""
        dtype, before = self.settings["dtype"], self.known.get((url, self.policy))
        if before is not None and apart(log_probs, before) > ALIKE[dtype]:
            return True
        return self.expected is not None and apart(log_probs, self.expected) > APART[dtype]
