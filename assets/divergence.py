"""How far a policy is from a reference language model: KL(reference || policy), by samples of the reference."""

from __future__ import annotations

from collections.abc import Iterator

import polars as pl

from textalign_dagster.experiment import Experiment
from textalign_dagster.measures import statistics
from textalign_dagster.measures.statistics import Estimate
from textalign_dagster.pool.conditioning import render
from textalign_dagster.segments import cut

NAME = "reference"

LOG_PROBS = pl.Schema({"sample_id": pl.String, "log_prob": pl.Float64})


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
