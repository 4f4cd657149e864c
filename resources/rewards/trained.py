"""Models that an experiment trained, as scorers or judges of others: `model: EXPERIMENT@ITERATION`."""

from __future__ import annotations

from resources.store import Artifact, ArtifactError, ArtifactStore
from textalign_dagster.scorers import JudgeModel, ModelScorer, Scorer

INPUTS = ("reward_model ", "judge_model ")
"""Prefixes of an artifact's inputs that are checkpoints of other experiments; `EXPERIMENT@ITERATION` follows."""


def trained(scorer: Scorer | None, store: ArtifactStore) -> Artifact | None:
    """The checkpoint that a scorer names; None: it names none.

    Raises:
        ArtifactError: that checkpoint does not exist.
    """
    named = None if scorer is None else scorer.trained
    if named is None:
        return None
    experiment, iteration = named
    pointer = store.pointer(experiment, iteration, "checkpoint")
    if pointer is None:
        raise ArtifactError(
            f"model: {experiment}@{iteration}: experiment {experiment} has no checkpoint of iteration "
            f"{iteration} yet; run it first (`textalign run {experiment} --iterations {iteration}`)"
        )
    return pointer.artifact


def inputs(scorer: Scorer | None, store: ArtifactStore) -> dict[str, str]:
    """Name → key of the checkpoint that the scores depend on, if there is one; raises like :func:`trained`."""
    found = trained(scorer, store)
    if found is None or not isinstance(scorer, ModelScorer | JudgeModel):
        return {}
    return {f"{INPUTS[isinstance(scorer, JudgeModel)]}{scorer.model}": found.key}


def located(scorer: Scorer, store: ArtifactStore) -> Scorer:
    """The scorer with the folder of the model that it names; raises like :func:`trained`."""
    found = trained(scorer, store)
    return scorer if found is None else scorer.model_copy(update={"model": str(found.path("model"))})
