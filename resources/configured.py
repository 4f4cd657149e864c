"""The resources as Dagster hands them to assets."""

import json
from functools import cache
from typing import Literal

import dagster as dg
from pydantic import Field

from resources.sampler import Sampler
from resources.store import ArtifactStore
from resources.transformers_sampler import TransformersSampler
from resources.vllm_sampler import VllmSampler
from textalign_dagster.experiment import Experiment, Vllm
from textalign_dagster.experiment_files import store_url
from textalign_dagster.ids import canonical_json


class StoreResource(dg.ConfigurableResource):
    """Where all tables and checkpoints are kept."""

    url: str = Field(
        "", description="A folder or an object store's URL; empty: $TEXTALIGN_STORE, else state/store."
    )

    def open(self) -> ArtifactStore:
        """The store, which costs nothing to open."""
        return ArtifactStore(self.url or store_url())


class SamplerResource(dg.ConfigurableResource):
    """Engines that sample; each is started once in a process and serves all its stages."""

    def of(self, experiment: Experiment) -> Sampler:
        """The engine an experiment asks for; it starts when it is first used."""
        policy, sampling = experiment.policy, experiment.sampling
        engine = _engine(
            sampling.engine,
            policy.dtype,
            sampling.batch_size,
            policy.trust_remote_code,
            canonical_json((sampling.vllm or Vllm()).model_dump()),
        )
        _make_room(engine)
        return engine

    def make_room(self) -> None:
        """Ends the engines whose memory training needs; those on the CPU stay, for they cost a start."""
        _make_room(None)


_engines: list[Sampler] = []


def _make_room(kept: Sampler | None) -> None:
    for engine in _engines:
        if engine.on_accelerator and engine is not kept:
            engine.close()


@cache
def _engine(
    name: Literal["transformers", "vllm"],
    dtype: Literal["float32", "bfloat16", "float16"],
    batch_size: int,
    trust_remote_code: bool,
    vllm: str,
) -> Sampler:
    engine: Sampler
    if name == "vllm":
        engine = VllmSampler(
            dtype=dtype, batch_size=batch_size, trust_remote_code=trust_remote_code, **json.loads(vllm)
        )
    else:
        engine = TransformersSampler(dtype=dtype, batch_size=batch_size, trust_remote_code=trust_remote_code)
    _engines.append(engine)
    return engine
