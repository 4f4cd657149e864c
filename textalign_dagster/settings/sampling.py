"""How samples are drawn: the section ``sampling`` of an experiment."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from textalign_dagster.settings import Settings
from textalign_dagster.settings.clusters import RayNode, SlurmNode
from textalign_dagster.settings.kubernetes import KubernetesPod
from textalign_dagster.settings.structured import Structured

HIGHEST_RANK = 512
"""Of the adapters that vLLM can serve."""


class Vllm(Settings):
    """How vLLM runs a policy: nothing here changes what is sampled."""

    tensor_parallel: int = Field(1, ge=1, description="GPUs over which a model is split.")
    data_parallel: int = Field(
        1, ge=1, description="Engines that run in parallel, each with its own tensor_parallel GPUs."
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="Share of a GPU's memory for weights and KV cache."
    )
    kv_cache_gib: float | None = Field(
        None, gt=0, description="GiB of KV cache; null: what is left on a GPU, 1 on a CPU."
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        description="Maximum number of tokens of a prompt with its completion; null: the model's maximum "
        "(which takes a lot of memory with long contexts).",
    )
    enforce_eager: bool | None = Field(
        None, description="Whether compilation is skipped; null: only on a CPU."
    )


class Endpoints(Settings):
    """vLLM servers that are already running: nothing here changes what is sampled."""

    urls: list[str] = Field(
        ...,
        min_length=1,
        description="URLs of the servers, e.g. http://gpu1:8000; the least busy one gets the next request.",
    )
    api_key_env: str | None = Field(
        None, description="The environment variable with the servers' key (their --api-key); null: none."
    )
    timeout_s: float = Field(
        600.0, gt=0, description="Seconds until a request times out; its server is then left out."
    )
    verify: bool = Field(
        True,
        description="Compare the servers' log-probabilities of a short text with those of transformers on "
        "this machine's CPU, once per policy; it needs memory for the model.",
    )

    @field_validator("urls")
    @classmethod
    def _plain(cls, urls: list[str]) -> list[str]:
        for url in urls:
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError(f"{url!r} is not a URL of a server; give e.g. http://gpu1:8000")
            if parts.username or parts.password:
                raise ValueError(
                    f"the URL of {parts.hostname} carries credentials; put the key into an environment variable "
                    "and name it in api_key_env"
                )
        if len(set(urls)) < len(urls):
            raise ValueError("a server is listed twice; remove one")
        return urls


class Sampling(Settings):
    """How samples are drawn from the policy."""

    engine: Literal["transformers", "vllm", "endpoints"] = Field(
        "transformers",
        description="What generates samples: `transformers` (CPU or GPU), `vllm` (far faster with larger models), or "
        "`endpoints` (vLLM servers that you have started); see docs/sampling.md.",
    )
    vllm: Vllm | None = Field(None, description="`engine: vllm`: how it is run; null: the defaults.")
    endpoints: Endpoints | None = Field(None, description="`engine: endpoints`: where the servers are.")
    launcher: Literal["local", "slurm", "ray", "k8s"] = Field(
        "local",
        description="Where the engine runs: on this machine, as a job of a Slurm cluster, on Ray, or as a pod of "
        "Kubernetes (docs/clusters.md).",
    )
    slurm: SlurmNode = Field(
        SlurmNode(), description="The job, with `launcher: slurm`: one node for each engine."
    )
    ray: RayNode = Field(RayNode(), description="The resources of each engine, with `launcher: ray`.")
    k8s: KubernetesPod = Field(
        KubernetesPod(), description="The pod, with `launcher: k8s`: one for each engine."
    )
    samples_per_prompt: int = Field(8, ge=1, description="Completions per drawn prompt.")
    temperature: float = Field(
        1.0,
        ge=0,
        description="Below 1 the samples are sharper than the policy, and training on them sharpens it.",
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Nucleus sampling; 1 keeps the whole vocabulary.")
    top_k: int = Field(0, ge=0, description="Most likely tokens kept; 0 keeps all.")
    max_new_tokens: int = Field(64, ge=1, description="Longest completion, in tokens.")
    min_new_tokens: int = Field(0, ge=0, description="Tokens before an end token can be sampled.")
    ignore_eos: bool = Field(
        False, description="Always sample max_new_tokens, so that short answers cannot win."
    )
    structured: Structured | None = Field(
        None,
        description="The form that every completion must have (one of choice, regex, json_schema, grammar), with "
        "`engine: vllm` or `endpoints`; null: free text.",
    )
    adapters: Literal["merged", "served"] = Field(
        "merged",
        description="How checkpoints of training.lora are sampled from: merged, or as the base policy with the adapter "
        "on top (served; `engine: vllm` or `endpoints`), so that the engine never loads other weights.",
    )
    batch_size: int = Field(256, ge=1, description="Sequences decoded together.")
    chunk: int = Field(
        16_384,
        ge=1,
        description="Completions saved at a time: the most that a crash during sampling loses.",
    )

    @model_validator(mode="after")
    def _lengths(self) -> Sampling:
        if self.min_new_tokens > self.max_new_tokens:
            raise ValueError("min_new_tokens is larger than max_new_tokens; lower it")
        return self

    @model_validator(mode="after")
    def _structure(self) -> Sampling:
        if self.structured is not None and self.engine == "transformers":
            raise ValueError(
                "structured: `engine: transformers` samples free text only; set `engine: vllm` or `endpoints`, "
                "or remove it"
            )
        if self.structured is not None and (self.min_new_tokens or self.ignore_eos):
            raise ValueError(
                "structured: a completion ends where its structure does; remove min_new_tokens and ignore_eos"
            )
        return self

    @model_validator(mode="after")
    def _engine(self) -> Sampling:
        if self.vllm is not None and self.engine != "vllm":
            raise ValueError(f"vllm: only for `engine: vllm`, not {self.engine}; remove it")
        if self.endpoints is not None and self.engine != "endpoints":
            raise ValueError(f"endpoints: only for `engine: endpoints`, not {self.engine}; remove it")
        if self.engine == "endpoints" and self.endpoints is None:
            raise ValueError("endpoints: `engine: endpoints` needs `endpoints: {urls: [http://…]}`")
        if self.engine == "endpoints" and self.launcher != "local":
            raise ValueError("launcher: servers run where they were started; remove it")
        if self.launcher == "k8s":
            self.k8s.check_complete()
        if self.adapters == "served" and self.engine == "transformers":
            raise ValueError(
                "adapters: `engine: transformers` only supports merged ones; set adapters to merged, or `engine: vllm` "
                "or `endpoints`"
            )
        return self

    @property
    def served(self) -> dict[str, str]:
        """Additional identity of samples of served adapters, because their last digits can differ."""
        return {} if self.adapters == "merged" else {"adapters": self.adapters}
