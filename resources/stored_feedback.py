"""An iteration's stored feedback, for exports and comparisons."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from resources.store import Artifact, ArtifactStore
from textalign_dagster.judging.pair_asks import reference_id
from textalign_dagster.settings import SettingsError


@dataclass(frozen=True)
class Judgements:
    """The feedback on an iteration's samples.

    Attributes:
        samples: sample_id, prompt_id, prompt, text, reference; references that samples were compared
            with are also rows.
        feedback: FEEDBACK.
        pairs: PAIRS; None if nothing was compared.
        repeats: FEEDBACK_REPEATS; None if every question was asked once.
    """

    samples: pl.DataFrame
    feedback: pl.DataFrame
    pairs: pl.DataFrame | None
    repeats: pl.DataFrame | None = None

    @property
    def rounds(self) -> tuple[pl.DataFrame, pl.DataFrame] | None:
        """The first two answers to each question that was asked several times."""
        if self.repeats is None:
            return None
        return self.repeats.filter(repeat=0), self.repeats.filter(repeat=1)


def with_references(generations: Artifact, draws: Artifact) -> pl.DataFrame:
    """GENERATIONS with the column reference: the human answer to the prompt, where the source has one."""
    references = draws.frame("prompt_draws").select("draw_id", "reference")
    return generations.frame("generations").join(references, on="draw_id", how="left", maintain_order="left")


def unjudged_samples(store: ArtifactStore, name: str, iteration: int) -> pl.DataFrame | None:
    """An iteration's samples (sample_id, prompt, text, reference) if they have no feedback yet, else None."""
    if store.pointer(name, iteration, "feedback") is not None:
        return None
    draws, generations = (store.pointer(name, iteration, stage) for stage in ("prompt_draws", "generations"))
    if draws is None or generations is None:
        raise SettingsError(f"{name}, iteration {iteration}, has no samples yet: textalign run {name}")
    samples = with_references(generations.artifact, draws.artifact)
    return samples.select("sample_id", "prompt", "text", "reference")


def evaluated_samples(store: ArtifactStore, name: str, iteration: int) -> pl.DataFrame:
    """The completions (prompt, text) of an iteration's evaluation, from the policy as it is meant to be used.

    Raises:
        SettingsError: the iteration has not been evaluated yet.
    """
    found = store.pointer(name, iteration, "evaluation")
    if found is None:
        raise SettingsError(f"{name}, iteration {iteration}, has no evaluation yet: textalign run {name}")
    return found.artifact.frame("evaluation_samples").filter(role="main").select("prompt", "text")


def judgements_of(store: ArtifactStore, name: str, iteration: int) -> Judgements:
    """The feedback of an iteration.

    Raises:
        SettingsError: there is no feedback yet.
    """
    found = [store.pointer(name, iteration, stage) for stage in ("prompt_draws", "generations", "feedback")]
    artifacts = [pointer.artifact for pointer in found if pointer is not None]
    if len(artifacts) < len(found):
        raise SettingsError(f"{name}, iteration {iteration}, has no feedback yet: textalign run {name}")
    draws, generations, feedback = artifacts
    samples = with_references(generations, draws)
    samples = samples.select("sample_id", "prompt_id", "prompt", "text", "reference")
    pairs = feedback.frame("pairs") if "pairs" in feedback.tables else None
    if pairs is not None:
        samples = pl.concat([samples, _compared_references(samples, pairs)])
    repeats = feedback.frame("feedback_repeats") if "feedback_repeats" in feedback.tables else None
    return Judgements(samples, feedback.frame("feedback"), pairs, repeats)


def ratings_and_rankings(
    store: ArtifactStore, rated: str, ranked: str, iteration: int
) -> tuple[Judgements, pl.DataFrame]:
    """The judgements of one experiment and the pairs of another, for the same samples.

    Raises:
        SettingsError: one of them has no such feedback, or they have no sample in common.
    """
    ratings, rankings = (judgements_of(store, name, iteration) for name in (rated, ranked))
    if rankings.pairs is None:
        raise SettingsError(
            f"{ranked}: its judge compared no samples (`judge.ask: ranking` does); name such an experiment second"
        )
    if ratings.feedback["value"].null_count() == ratings.feedback.height:
        raise SettingsError(
            f"{rated}: its feedback has no numbers to compare; name an experiment with ratings first"
        )
    compared = {*rankings.pairs["sample_a"], *rankings.pairs["sample_b"]}
    if compared.isdisjoint(ratings.feedback["sample_id"]):
        raise SettingsError(
            f"{rated} and {ranked} have no sample in common in iteration {iteration}; they need the same task, "
            "prompts, policy, sampling and seed, and from iteration 2 on the same checkpoints"
        )
    return ratings, rankings.pairs


def _compared_references(samples: pl.DataFrame, pairs: pl.DataFrame) -> pl.DataFrame:
    """The references that occur in pairs, as samples."""
    distinct = samples.filter(pl.col("reference").is_not_null()).unique(
        ["prompt_id", "reference"], maintain_order=True
    )
    ids = [reference_id(*row) for row in distinct.select("prompt_id", "reference").iter_rows()]
    rows = distinct.with_columns(sample_id=pl.Series(ids, dtype=pl.String), text=pl.col("reference"))
    return rows.filter(pl.col("sample_id").is_in(set(pairs["sample_a"])))
