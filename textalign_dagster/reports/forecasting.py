"""What an iteration's judging will take: calls, tokens, money, time, and what is paid already."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import polars as pl

from resources.freshness import Freshness
from resources.judges.ask import forecast_judging
from resources.store import ArtifactStore
from resources.stored_feedback import with_references
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.sources import training_prompts
from textalign_dagster.ids import content_hash
from textalign_dagster.prompts import draw_prompts, prompt_id
from textalign_dagster.settings import SettingsError

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
    draws = freshness.pointer(iteration, "prompt_draws")
    pointer = freshness.pointer(iteration, "generations")
    if exact and draws is not None and pointer is not None:
        samples = with_references(pointer.artifact, draws.artifact)
    else:
        samples = _imagined(experiment, iteration)
    found = asdict(forecast_judging(experiment.judge, samples, store))
    return {"experiment": name, "iteration": iteration, "samples_exist": exact, **found}


def _imagined(experiment: Experiment, iteration: int) -> pl.DataFrame:
    """Samples as many and as long as they can be; each is another text, for equal ones are asked once."""
    longest = experiment.sampling.max_new_tokens * CHARACTERS_PER_TOKEN
    prompts = training_prompts(experiment)
    # A weighted draw depends on tables to come; here every prompt weighs the same.
    weights = {prompt_id(prompt): 1.0 for prompt in prompts["prompt"]}
    drawn = draw_prompts(
        prompts, experiment.prompts, seed=experiment.seed, iteration=iteration, weights=weights
    )
    rows = [
        {"sample_id": content_hash("imagined", draw, n), **shown, "text": f"{draw}-{n}".rjust(longest, "x")}
        for draw, shown in enumerate(drawn.select("prompt_id", "prompt", "reference").iter_rows(named=True))
        for n in range(experiment.sampling.samples_per_prompt)
    ]
    columns = ("sample_id", "prompt_id", "prompt", "reference", "text")
    return pl.DataFrame(rows, dict.fromkeys(columns, pl.String))
