"""The engine for vLLM servers that are already running. This side imports nothing heavy.

    with EndpointsSampler(["http://gpu1:8000", "http://gpu2:8000"]) as sampler:
        sampler.generate(Path("policy"), [Request("def f(x):", (1, 2))], Decoding(temperature=1))

Requests go to the least busy server; one that fails is left out for the rest of the call. Before samples
are drawn, every server is given the policy's weights; afterwards it is checked that it still has them
(`weights`).
"""

from __future__ import annotations

import importlib.metadata
import logging
from collections.abc import Sequence
from typing import Any, Literal

from resources.engines.sampler import SamplerError
from resources.engines.worker_sampler import WorkerSampler
from resources.workers.channel import Channel

WORKER_VERSION = 1  # increase with any change after which a seed yields a different sample
log = logging.getLogger(__name__)


class EndpointsSampler(WorkerSampler):
    """Samples from causal language models on vLLM servers, and scores texts with them; see `sampler.Sampler`.

    urls: of the servers, with or without ``/v1``.
    dtype: number format of the weights; the servers must have been started with it.
    batch_size: maximum number of concurrent requests per server.
    api_key_env: the environment variable with the servers' key, if they require one.
    timeout_s: seconds for one request.
    verify: whether log-probabilities are compared with those of transformers on this machine.
    adapters: whether adapters are served on top of the servers' weights.
    """

    engine = "endpoints"

    def __init__(
        self,
        urls: Sequence[str],
        *,
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        batch_size: int = 256,
        trust_remote_code: bool = False,
        api_key_env: str | None = None,
        timeout_s: float = 600.0,
        verify: bool = True,
        adapters: bool = False,
    ) -> None:
        self.settings = {
            "urls": [url.rstrip("/").removesuffix("/v1") for url in urls],
            "dtype": dtype,
            "batch_size": batch_size,
            "trust_remote_code": trust_remote_code,
            "api_key_env": api_key_env,
            "timeout_s": timeout_s,
            "verify": verify,
            "adapters": adapters,
        }
        self.left_out: dict[str, str] = {}  # URL → why, in the last call
        self._version: str | None = None
        channel = Channel(
            "resources.engines.endpoints.worker",
            self.settings,
            error=SamplerError,
            what="worker of the sampling endpoints",
            offline=not trust_remote_code,  # models are local folders
        )
        super().__init__([channel])
        self.serves_adapters = adapters

    @property
    def engine_version(self) -> str:
        """Versions of everything that a sample depends on, number format included; queries the servers once."""
        if self._version is None:
            (self._version,) = self._rows_of(self.channels[0].call({"op": "version", "total": 0}))
        names = ("transformers", "tokenizers")
        versions = "+".join(f"{name}-{importlib.metadata.version(name)}" for name in names)
        adapters = "+adapters" if self.serves_adapters else ""
        return (
            f"vllm-{self._version}+{versions}+endpoints-{WORKER_VERSION}+{self.settings['dtype']}{adapters}"
        )

    def close(self) -> None:
        """Stop the worker; the servers keep running."""
        super().close()
        self._version = None

    def _rows_of(self, result: Any) -> list[Any]:
        self.left_out = result["left_out"]
        for url, why in self.left_out.items():
            log.warning("%s is left out: %s", url, why)
        return list(result["rows"])
