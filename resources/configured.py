"""The resources that Dagster passes to assets."""

import json
from functools import cache
from typing import Any, Literal

import dagster as dg
from pydantic import Field

from resources.engines.endpoints.sampler import EndpointsSampler
from resources.engines.sampler import Sampler
from resources.engines.transformers.sampler import TransformersSampler
from resources.engines.vllm.sampler import VllmSampler
from resources.store import ArtifactStore
from resources.workers.host import host_of
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.files import store_url
from textalign_dagster.ids import canonical_json
from textalign_dagster.settings.clusters import RayNode, SlurmNode
from textalign_dagster.settings.kubernetes import KubernetesPod
from textalign_dagster.settings.sampling import Vllm


class StoreResource(dg.ConfigurableResource):
    """Where all tables and checkpoints are stored."""

    url: str = Field(
        "", description="A folder or an object store's URL; if empty, $TEXTALIGN_STORE, else state/store."
    )

    def open(self) -> ArtifactStore:
        """The store; opening it costs nothing."""
        return ArtifactStore(self.url or store_url())


class SamplerResource(dg.ConfigurableResource):
    """Sampling engines; each is started once per process and serves all of its stages."""

    def of(self, experiment: Experiment) -> Sampler:
        """The engine that an experiment requests; it starts on first use."""
        policy, sampling = experiment.policy, experiment.sampling
        options: dict[str, Any] = {}
        if sampling.engine == "vllm":
            options = (sampling.vllm or Vllm()).model_dump() | _served(experiment)
            options["structured"] = sampling.structured is not None
        elif sampling.endpoints is not None:
            options = sampling.endpoints.model_dump() | {"adapters": sampling.adapters == "served"}
        engine = _engine(
            sampling.engine,
            policy.dtype,
            sampling.batch_size,
            policy.trust_remote_code,
            canonical_json(options),
            sampling.launcher,
            canonical_json(sampling.slurm.model_dump()),
            canonical_json(sampling.ray.model_dump()),
            canonical_json(sampling.k8s.model_dump()),
        )
        self.make_room(engine)
        return engine

    def make_room(self, keep: Sampler | None = None) -> None:
        """Closes engines that hold a GPU or a node, to free it; those on this CPU stay, to save a restart."""
        for engine in _engines:
            if engine.on_accelerator and engine is not keep:
                engine.close()


def _served(experiment: Experiment) -> dict[str, Any]:
    """What an engine needs to know to serve adapters; empty if it serves none."""
    lora = experiment.training.lora
    if experiment.sampling.adapters == "merged" or lora is None:
        return {}
    return {"max_lora_rank": lora.rank, "lora_modules": lora.target_modules}


_engines: list[Sampler] = []


@cache
def _engine(
    name: Literal["transformers", "vllm", "endpoints"],
    dtype: Literal["float32", "bfloat16", "float16"],
    batch_size: int,
    trust_remote_code: bool,
    options: str,
    launcher: str,
    slurm: str,
    ray: str,
    k8s: str,
) -> Sampler:
    kinds = {"transformers": TransformersSampler, "vllm": VllmSampler, "endpoints": EndpointsSampler}
    host = host_of(
        launcher,
        SlurmNode.model_validate_json(slurm),
        RayNode.model_validate_json(ray),
        KubernetesPod.model_validate_json(k8s),
    )
    remote = {} if host is None else {"host": host}
    engine: Sampler = kinds[name](
        dtype=dtype,
        batch_size=batch_size,
        trust_remote_code=trust_remote_code,
        **json.loads(options),
        **remote,
    )
    _engines.append(engine)
    return engine
