"""How far a policy is from a reference language model: KL(reference || policy), estimated on samples of the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import polars as pl

from assets.stage import PolicyFolder
from resources.engines.sampler import Sampler
from resources.store import Artifact, Draft
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.evaluation import Asked
from textalign_dagster.loop.stages import EVALUATION_DIVERGENCE, swapped
from textalign_dagster.measures import statistics
from textalign_dagster.measures.statistics import Estimate
from textalign_dagster.pool.conditioning import render
from textalign_dagster.segments import cut

NAME = "reference"

LOG_PROBS = pl.Schema({"sample_id": pl.String, "log_prob": pl.Float64})


@dataclass(frozen=True)
class Divergence:
    """The distances of policies from one reference.

    Attributes:
        reference: the model that generated ``samples`` (sample_id, prompt_id, text).
        prompts: prompt_id, prompt.
        keep: returns the artifact for settings and inputs, computing it if it does not exist.
    """

    experiment: Experiment
    reference: PolicyFolder
    samples: Artifact
    prompts: pl.DataFrame
    engine: Sampler
    keep: Callable[..., Artifact]
    report: Callable[..., None]

    def log_probs(self, model: PolicyFolder, asked: Asked) -> Artifact:
        """The log-probabilities of the samples under a model with its condition: a table of
        :data:`LOG_PROBS`."""
        experiment, corpus = self.experiment, self.experiment.corpus

        def produce(draft: Draft) -> None:
            known = self.samples.frame("sampled").join(self.prompts, on="prompt_id", maintain_order="left")
            columns = known.select("sample_id", "prompt_id", "prompt", "text")
            parts = [
                (sample_id, pair)
                for sample_id, prompt_id, prompt, text in columns.iter_rows()
                for pair in pieces(experiment, asked.text(prompt_id), prompt, text)
            ]
            found = self.engine.logprobs(
                model.path, [pair for _, pair in parts], partial(self.report, note="KL")
            )
            rows = [(sample_id, logprob) for (sample_id, _), (logprob, _) in zip(parts, found, strict=True)]
            by_sample = pl.DataFrame(rows, LOG_PROBS, orient="row").group_by("sample_id", maintain_order=True)
            draft.write("log_probs", by_sample.agg(pl.col("log_prob").sum()), LOG_PROBS)

        engine, conditioned = experiment.sampling.engine, asked.condition is not None
        settings = {
            "engine": engine,
            "dtype": experiment.policy.dtype,
            "asked": vars(asked) if conditioned else None,
            "template": experiment.method.template if conditioned else None,
            "segments": corpus.segments if corpus is not None and experiment.method.per_segment else None,
            **swapped(engine),
        }
        inputs = {"samples": self.samples.key, "model": model.policy_hash}
        return self.keep(EVALUATION_DIVERGENCE, settings, inputs, produce)

    def of(self, model: PolicyFolder, asked: Asked) -> Estimate:
        """KL(reference || model), in nats per text."""
        known = self.log_probs(self.reference, Asked(None, "baseline")).frame("log_probs")
        own = self.log_probs(model, asked).frame("log_probs")
        return estimated(known, own, self.samples.frame("sampled"), self.experiment.evaluation.resamples)


def pieces(
    experiment: Experiment, condition: str | None, prompt: str, text: str
) -> Iterator[tuple[str, str]]:
    """A text as a policy reads it after a prompt: pairs of context and continuation, whose log-probabilities add up.

    A policy that was trained with a control token before each segment of a document reads one before each
    line of the text (or sentence); the tokens themselves are not measured.
    """
    context = render(experiment.method.template, condition, prompt)
    corpus = experiment.corpus
    if condition is None or corpus is None or not experiment.method.per_segment:
        yield context, text
        return
    for i, (start, end) in enumerate(cut(text, corpus.segments)):
        context += condition if i else ""  # the first piece continues the prompt's last line
        yield context, text[start:end]
        context += text[start:end]


def estimated(
    reference: pl.DataFrame, policy: pl.DataFrame, samples: pl.DataFrame, resamples: int
) -> Estimate:
    """The mean over texts of log p_reference − log p_policy, in nats per text; prompts are resampled.

    Args:
        reference, policy: sample_id, log_prob of the reference's samples.
        samples: sample_id, prompt_id.
    """
    joined = samples.join(reference, on="sample_id").join(policy, on="sample_id", suffix="_policy")
    gaps = (joined["log_prob"] - joined["log_prob_policy"]).to_list()
    return statistics.mean(gaps, joined["prompt_id"].to_list(), resamples=resamples)
