"""The resources as Dagster hands them to assets."""

from functools import cache
from typing import Literal

import dagster as dg
from pydantic import Field

from resources.sampler import Sampler
from resources.store import ArtifactStore
from resources.transformers_sampler import TransformersSampler
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment_files import store_url


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
        return _engine(
            experiment.policy.dtype, experiment.sampling.batch_size, experiment.policy.trust_remote_code
        )

    def make_room(self) -> None:
        """Ends the engines whose memory training needs; those on the CPU stay, for they cost a start."""
        for engine in _engines:
            if engine.on_accelerator:
                engine.close()


_engines: list[TransformersSampler] = []


@cache
def _engine(
    dtype: Literal["float32", "bfloat16", "float16"], batch_size: int, trust_remote_code: bool
) -> TransformersSampler:
    engine = TransformersSampler(dtype=dtype, batch_size=batch_size, trust_remote_code=trust_remote_code)
    _engines.append(engine)
    return engine
