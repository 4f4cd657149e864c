"""The cost of judging an iteration: calls, tokens, money, time, and what is already paid for."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import polars as pl

from resources.freshness import Freshness
from resources.judges.ask import forecast_judging
from resources.store import ArtifactStore
from resources.stored_feedback import with_references
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.offline import offline_samples
from textalign_dagster.experiment.sources import task_of, training_prompts
from textalign_dagster.ids import content_hash
from textalign_dagster.prompts import DEFAULT_DRAW, draw_prompts, prompt_id
from textalign_dagster.settings import SettingsError

CHARACTERS_PER_TOKEN = 4  # of English; only for samples that do not exist yet
ASSUMED_PROMPT = 400  # tokens, about a TL;DR post
PLACEHOLDER_COLUMNS = ("sample_id", "prompt_id", "prompt", "reference", "text")


def forecast_iteration(
    store: ArtifactStore, name: str, experiment: Experiment, iteration: int
) -> dict[str, Any]:
    """The forecast of one iteration.

    Once its samples exist, the forecast counts those, and calls found in the ledger cost nothing.
    Before that, it is an upper bound: as many samples as will be drawn, each of the maximum length.

    Raises:
        SettingsError: the experiment has no judge, or its template cannot be used.
    """
    if experiment.judge is None:
        raise SettingsError(
            f"{name} has no `judge`: its task scores samples itself, without judge calls ({experiment.task.scorer[0]})"
        )
    freshness = Freshness(store, name, experiment)
    draws = freshness.pointer(iteration, "prompt_draws")
    pointer = freshness.pointer(iteration, "generations")
    assumption = None
    try:
        exact = freshness.state(iteration, "generations").kind == "fresh"
        drawn = None if exact else _drawn(experiment, iteration)
    except SettingsError as error:
        if experiment.prompts.path is not None or experiment.offline is not None:
            raise  # a named file, which the user can fix
        exact, drawn, assumption = False, *_assumed(experiment, error)
    if exact and draws is not None and pointer is not None:
        samples = with_references(pointer.artifact, draws.artifact)
    else:
        samples = _placeholder_samples(experiment, _drawn(experiment, iteration) if drawn is None else drawn)
    found = asdict(forecast_judging(experiment.judge, samples, store))
    known = {"experiment": name, "iteration": iteration, "samples_exist": exact, "assumption": assumption}
    return {**known, **found}


def _assumed(experiment: Experiment, error: SettingsError) -> tuple[pl.DataFrame, str]:
    """Placeholders for prompts that cannot be read here, and a sentence on what is assumed."""
    count = experiment.prompts.per_iteration or DEFAULT_DRAW
    text = "x" * (ASSUMED_PROMPT * CHARACTERS_PER_TOKEN)
    drawn = pl.DataFrame(
        {
            "prompt_id": [f"assumed {i}" for i in range(count)],
            "prompt": [f"{i} {text}" for i in range(count)],
            "reference": [text] * count,
        }
    )
    return drawn, (
        f"the prompts cannot be read here ({error}); {count:,} prompts of {ASSUMED_PROMPT} tokens are assumed, each "
        f"with a reference of the same length and {experiment.sampling.samples_per_prompt} samples of each"
    )


def _drawn(experiment: Experiment, iteration: int) -> pl.DataFrame:
    """The prompts that the iteration will draw."""
    prompts = training_prompts(experiment)
    # A weighted draw depends on tables yet to be written; here all prompts have the same weight.
    weights = {prompt_id(prompt): 1.0 for prompt in prompts["prompt"]}
    return draw_prompts(
        prompts, experiment.prompts, seed=experiment.seed, iteration=iteration, weights=weights
    )


def _placeholder_samples(experiment: Experiment, drawn: pl.DataFrame) -> pl.DataFrame:
    """As many samples as can be drawn, as long as possible; their texts differ, because equal ones are judged once.

    For an offline experiment, the file's responses, which are known.
    """
    if experiment.offline is not None:
        references = drawn.select("draw_id", "reference")
        responses = offline_samples(experiment, task_of(experiment), drawn)
        return responses.join(references, on="draw_id", maintain_order="left").select(PLACEHOLDER_COLUMNS)
    longest = experiment.sampling.max_new_tokens * CHARACTERS_PER_TOKEN
    rows = [
        {"sample_id": content_hash("imagined", draw, n), **shown, "text": f"{draw}-{n}".rjust(longest, "x")}
        for draw, shown in enumerate(drawn.select("prompt_id", "prompt", "reference").iter_rows(named=True))
        for n in range(experiment.sampling.samples_per_prompt)
    ]
    return pl.DataFrame(rows, dict.fromkeys(PLACEHOLDER_COLUMNS, pl.String))
