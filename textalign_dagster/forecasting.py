"""What an iteration's judging will take: calls, tokens, money, time, and what is paid already."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import polars as pl

from resources.freshness import Freshness
from resources.judging import forecast_of
from resources.store import ArtifactStore
from textalign_dagster.experiment import Experiment
from textalign_dagster.settings import SettingsError
from textalign_dagster.sources import training_prompts

CHARACTERS_PER_TOKEN = 4  # of English; only for samples that do not exist yet


def forecast_iteration(
    store: ArtifactStore, name: str, experiment: Experiment, iteration: int
) -> dict[str, Any]:
    """The forecast of one iteration.

    Once its samples exist, they are what is counted, and calls found in the ledger cost nothing.
    Before that it is an upper bound: as many samples as will be drawn, each as long as they can be.

    Raises:
        SettingsError: the experiment has no judge, or its template cannot be used.
    """
    if experiment.judge is None:
        raise SettingsError(
            f"{name} has no `judge`: its task judges by itself, without calls ({experiment.task.scorer[0]})"
        )
    freshness = Freshness(store, name, experiment)
    exact = freshness.state(iteration, "generations").kind == "fresh"
    pointer = freshness.pointer(iteration, "generations")
    if exact and pointer is not None:
        samples = pointer.artifact.frame("generations").select("prompt", "text")
    else:
        samples = _imagined(experiment)
    found = asdict(forecast_of(experiment, samples, store))
    return {"experiment": name, "iteration": iteration, "samples_exist": exact, **found}


def _imagined(experiment: Experiment) -> pl.DataFrame:
    """Samples as many and as long as they can be; each is another text, for equal ones are asked once."""
    prompts = training_prompts(experiment)["prompt"]
    longest = experiment.sampling.max_new_tokens * CHARACTERS_PER_TOKEN
    count = experiment.prompts.per_iteration * experiment.sampling.samples_per_prompt
    return pl.DataFrame(
        {
            "prompt": [prompts[i % len(prompts)] for i in range(count)],
            "text": [f"{i:x}".rjust(longest, "x") for i in range(count)],
        }
    )
