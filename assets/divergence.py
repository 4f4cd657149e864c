"""How far a policy is from a reference language model: KL(reference || policy), by samples of the reference."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import polars as pl

from resources.store import Artifact, Draft
from textalign_dagster.experiment import Experiment
from textalign_dagster.loop.stages import EVALUATION_DIVERGENCE, swapped
from textalign_dagster.measures import statistics
from textalign_dagster.measures.statistics import Estimate
from textalign_dagster.pool.conditioning import render
from textalign_dagster.reports.score_table import KL_REFERENCE, score_row
from textalign_dagster.segments import cut
from textalign_dagster.tables import SCORES

if TYPE_CHECKING:
    from assets.measuring import Measuring, Subject

NAME = "reference"

LOG_PROBS = pl.Schema({"sample_id": pl.String, "log_prob": pl.Float64})


def log_probs(measuring: Measuring, reference: Subject, subject: Subject) -> Artifact:
    """The log-probabilities of the reference's samples under a subject, as that is meant to be asked: a table of
    :data:`LOG_PROBS`, kept for later evaluations."""
    experiment, model, asked = measuring.experiment, subject.model, subject.asked[0]
    assert model is not None, "human answers are no model"
    samples = measuring.sampled(reference)

    def produce(draft: Draft) -> None:
        known = samples.frame("sampled").join(measuring.prompts, on="prompt_id", maintain_order="left")
        columns = known.select("sample_id", "prompt_id", "prompt", "text")
        parts = [
            (sample_id, pair)
            for sample_id, prompt_id, prompt, text in columns.iter_rows()
            for pair in pieces(experiment, asked.text(prompt_id), prompt, text)
        ]
        report = partial(measuring.report, note="KL")
        found = measuring.engine.logprobs(model.path, [pair for _, pair in parts], report)
        rows = [(sample_id, logprob) for (sample_id, _), (logprob, _) in zip(parts, found, strict=True)]
        by_sample = pl.DataFrame(rows, LOG_PROBS, orient="row").group_by("sample_id", maintain_order=True)
        draft.write("log_probs", by_sample.agg(pl.col("log_prob").sum()), LOG_PROBS)

    engine, conditioned = experiment.sampling.engine, asked.condition is not None
    by_segment = experiment.corpus is not None and experiment.method.per_segment
    settings = {
        "engine": engine,
        "dtype": experiment.policy.dtype,
        "asked": vars(asked) if conditioned else None,
        "template": experiment.method.template if conditioned else None,
        "segments": experiment.corpus.segments if experiment.corpus is not None and by_segment else None,
        **swapped(engine),
    }
    inputs = {"samples": samples.key, "model": subject.policy_hash}
    return measuring.kept(EVALUATION_DIVERGENCE, settings, inputs, produce)


def scores(measuring: Measuring, reference: Subject, subject: Subject) -> pl.DataFrame:
    """A row of SCORES: how far a subject is from the reference; none for human answers."""
    if subject.model is None:
        return pl.DataFrame(schema=SCORES)
    known, own = (log_probs(measuring, reference, one).frame("log_probs") for one in (reference, subject))
    samples, resamples = (
        measuring.sampled(reference).frame("sampled"),
        measuring.experiment.evaluation.resamples,
    )
    found, asked = estimated(known, own, samples, resamples), subject.asked[0]
    told = {"subject": subject.name, "role": asked.role, "condition": asked.condition}
    return pl.DataFrame([score_row(KL_REFERENCE, found, subject.policy_hash, **told)], SCORES)


def pieces(
    experiment: Experiment, condition: str | None, prompt: str, text: str
) -> Iterator[tuple[str, str]]:
    """A text as a policy reads it after a prompt: pairs of context and continuation, whose log-probabilities add up.

    A policy that was trained with a control token before each segment of a document reads one before each
    line of the text (or sentence); the tokens themselves are no part of what is measured.
    """
    context = render(experiment.method.template, condition, prompt)
    corpus = experiment.corpus
    if condition is None or corpus is None or not experiment.method.per_segment:
        yield context, text
        return
    for i, (start, end) in enumerate(cut(text, corpus.segments)):
        context += condition if i else ""  # the first piece goes on with the prompt's last line
        yield context, text[start:end]
        context += text[start:end]


def estimated(
    reference: pl.DataFrame, policy: pl.DataFrame, samples: pl.DataFrame, resamples: int
) -> Estimate:
    """The mean over texts of log p_reference − log p_policy, in nats a text; prompts are resampled.

    Args:
        reference, policy: sample_id, log_prob of the reference's samples.
        samples: sample_id, prompt_id.
    """
    joined = samples.join(reference, on="sample_id").join(policy, on="sample_id", suffix="_policy")
    gaps = (joined["log_prob"] - joined["log_prob_policy"]).to_list()
    return statistics.mean(gaps, joined["prompt_id"].to_list(), resamples=resamples)
