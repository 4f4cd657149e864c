"""Measuring policies: sampling, log-likelihoods, scoring, judging; then the tables of an evaluation.

What requires a model is stored separately (samples by policy and prompts, log-likelihoods by samples
and model), so that another scorer, judge or baseline never samples anything again, and an evaluation
interrupted by an outage of the judge resumes from there. No cell points at these parts; evaluations do.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import polars as pl

from assets.divergence import Divergence
from assets.stage import PolicyFolder, Stage
from assets.subjects import Subject, Subjects
from resources.configured import SamplerResource
from resources.engines import chunks as sampled_chunks
from resources.engines.sampler import Decoding, Request
from resources.store import Artifact, Draft
from textalign_dagster.experiment.evaluation import (
    check_evaluation,
    evaluation_prompts,
    max_new_tokens,
    reference_answers,
)
from textalign_dagster.experiment.policies import fluency_model
from textalign_dagster.ids import content_hash
from textalign_dagster.loop.stages import (
    EVALUATION_DIVERGENCE,
    EVALUATION_FLUENCY,
    EVALUATION_LM_EVAL,
    EVALUATION_RED_TEAM,
    EVALUATION_SAMPLING,
    swapped,
)
from textalign_dagster.pool.conditioning import render
from textalign_dagster.settings.structured import content_of
from textalign_dagster.tokenisation import beginning

VERSIONS = {
    EVALUATION_SAMPLING: 1,
    EVALUATION_FLUENCY: 1,
    EVALUATION_DIVERGENCE: 1,
    EVALUATION_RED_TEAM: 1,
    EVALUATION_LM_EVAL: 1,
}
"""Raised when a code change changes the result for the same inputs and settings."""

SAMPLED = pl.Schema(
    {
        "sample_id": pl.String,  # key
        "prompt_id": pl.String,
        "asked": pl.String,  # the condition's name in the scores
        "condition": pl.String,  # the condition as the policy read it
        "role": pl.String,
        "text": pl.String,
        "n_tokens": pl.Int32,  # NULL: a human answer
        "finish_reason": pl.String,
    }
)
SURPRISE = pl.Schema({"sample_id": pl.String, "nll": pl.Float64, "nll_tokens": pl.Int64})


@dataclass
class Seconds:
    """Wall time by part of the work."""

    parts: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        started = time.monotonic()
        yield
        self.parts[part] = self.parts.get(part, 0.0) + time.monotonic() - started


class Measuring:
    """What the evaluations of one cell share; everything they need is looked up at the start.

    Raises:
        SettingsError: a model is not available, or settings contradict each other.
    """

    def __init__(self, stage: Stage, sampler: SamplerResource) -> None:
        self.stage, self.sampler, self.experiment = stage, sampler, stage.experiment
        check_evaluation(self.experiment)
        self.prompts = evaluation_prompts(self.experiment)
        self.fluency = fluency_model(self.experiment)
        self.subjects = Subjects(stage, self.prompts)
        self.engine = sampler.of(self.experiment)
        self.report = stage.report()

    def prepare(self, subjects: Sequence[Subject], seconds: Seconds) -> None:
        """Does all of the engine's work, so that no model is loaded twice: the engine holds one at a time."""
        if self.subjects.reference is not None and self.subjects.reference.model is not None:
            with seconds.of("divergence"):
                self.divergence.log_probs(self.subjects.reference.model, self.subjects.reference.asked[0])
        sampled = []
        for subject in subjects:
            with seconds.of("sampling"):
                samples = self.sampled(subject)
            if subject.scenario is not None:
                continue  # nothing else is needed
            sampled.append(samples)
            if self.subjects.reference is not None and subject.model is not None:
                with seconds.of("divergence"):
                    self.divergence.log_probs(subject.model, subject.asked[0])
        with seconds.of("fluency"):
            for samples in sampled:
                self.surprise(samples)

    def sampled(self, subject: Subject) -> Artifact:
        """The subject's samples: a table of SAMPLED."""
        experiment, decoding = self.experiment, self._decoding(subject)
        conditioned = any(ask.condition is not None for ask in subject.asked)
        settings: dict[str, Any] = {"asked": [vars(ask) for ask in subject.asked]}
        if subject.model is not None:
            settings |= {
                "decoding": decoding.identity,
                "template": experiment.method.template if conditioned else None,
                "engine": experiment.sampling.engine,
                "dtype": experiment.policy.dtype,
                **experiment.sampling.served,
                **swapped(experiment.sampling.engine),
            }
        asked_of = self._prompts(subject).select("prompt_id", "seeds").rows()

        def produce(draft: Draft) -> None:
            chunks: list[str] = []
            rows = (
                self._answers()
                if subject.model is None
                else self._sample(subject, subject.model, decoding, chunks)
            )
            draft.write("sampled", pl.DataFrame(rows, SAMPLED), SAMPLED)
            draft.record(chunks=chunks)

        inputs = {"policy": subject.policy_hash, "prompts": content_hash("prompts and seeds", asked_of)}
        kept = self.kept(EVALUATION_SAMPLING, settings, inputs, produce)
        sampled_chunks.discard(self.stage.store, kept)
        return kept

    def _decoding(self, subject: Subject) -> Decoding:
        experiment, scenario = self.experiment, subject.scenario
        settings, longest = experiment.evaluation, max_new_tokens(experiment)
        if scenario is not None:
            return Decoding(
                temperature=settings.temperature if scenario.temperature is None else scenario.temperature,
                top_p=settings.top_p if scenario.top_p is None else scenario.top_p,
                max_new_tokens=scenario.max_new_tokens or longest,
                min_new_tokens=scenario.min_new_tokens,
                banned_tokens=(*subject.banned_tokens, *scenario.banned_tokens),
            )
        return Decoding(
            temperature=1.0 if subject.as_it_is else settings.temperature,
            top_p=1.0 if subject.as_it_is else settings.top_p,
            max_new_tokens=longest,
            min_new_tokens=experiment.sampling.min_new_tokens,
            ignore_eos=experiment.sampling.ignore_eos,
            banned_tokens=subject.banned_tokens,
            structured=content_of(experiment.sampling.structured),
        )

    def surprise(self, samples: Artifact) -> Artifact:
        """How surprising samples are to the fluency model: a table of SURPRISE, without the probes.

        Drift only matters for the way in which the policy is meant to be used.
        """

        def produce(draft: Draft) -> None:
            known = samples.frame("sampled").filter(pl.col("role") != "probe")
            pairs = (
                known.join(self.prompts, on="prompt_id", maintain_order="left")
                .select("prompt", "text")
                .rows()
            )
            found = self.engine.logprobs(self.fluency.path, pairs, partial(self.report, note="fluency"))
            nll = [(i, -logprob, n) for i, (logprob, n) in zip(known["sample_id"], found, strict=True)]
            draft.write("surprise", pl.DataFrame(nll, SURPRISE, orient="row"), SURPRISE)

        engine = self.experiment.sampling.engine
        settings = {"engine": engine, "dtype": self.experiment.policy.dtype, **swapped(engine)}
        inputs = {"samples": samples.key, "model": self.fluency.policy_hash}
        return self.kept(EVALUATION_FLUENCY, settings, inputs, produce)

    @cached_property
    def divergence(self) -> Divergence:
        """The distances from the reference of `evaluation.kl_reference`."""
        reference = self.subjects.reference
        assert reference is not None and reference.model is not None, "only with a reference"
        samples = self.sampled(reference)
        return Divergence(
            self.experiment, reference.model, samples, self.prompts, self.engine, self.kept, self.report
        )

    def samples(self, subject: Subject) -> pl.DataFrame:
        """A subject's samples with their surprise, before they are scored."""
        surprise = self.surprise(self.sampled(subject)).frame("surprise")
        return (
            self.unread_samples(subject)
            .join(surprise, on="sample_id", how="left", maintain_order="left")
            .with_columns(n_tokens=pl.coalesce("n_tokens", "nll_tokens").cast(pl.Int32))
        )

    def unread_samples(self, subject: Subject) -> pl.DataFrame:
        """A subject's samples without their surprise."""
        prompts = self._prompts(subject).drop("seeds")
        sampled = self.sampled(subject).frame("sampled")
        joined = sampled.join(prompts, on="prompt_id", maintain_order="left")
        return joined.with_columns(by_people=pl.lit(subject.model is None))

    def _sample(
        self, subject: Subject, model: PolicyFolder, decoding: Decoding, chunks: list[str]
    ) -> Iterator[dict[str, Any]]:
        """Rows of SAMPLED: a policy's completions under every condition.

        ``chunks`` collects the keys of the chunks that are stored until all completions are.
        """
        template, parts = self.experiment.method.template, len(subject.asked)
        prompts = self._prompts(subject)
        for index, ask in enumerate(subject.asked):
            shown = [
                render(template, ask.text(prompt_id), prompt)
                for prompt_id, prompt in prompts.select("prompt_id", "prompt").iter_rows()
            ]
            if "" in shown:  # texts from their very beginning
                begin = beginning(model.path, trust_remote_code=self.experiment.policy.trust_remote_code)
                shown = [text or begin for text in shown]
            seeds = prompts["seeds"].to_list()
            requests = [Request(text, tuple(own)) for text, own in zip(shown, seeds, strict=True)]
            progress = partial(_share, self.report, index, parts, subject.name or ask.role)
            sampled = sampled_chunks.sample(
                self.stage.store,
                self.engine,
                model.sampled,
                model.policy_hash,
                requests,
                decoding,
                self.experiment.sampling.chunk,
                progress,
            )
            chunks += sampled.chunks
            for prompt, several in zip(prompts.iter_rows(named=True), sampled.completions, strict=True):
                condition = ask.text(prompt["prompt_id"])
                conditioning = {"condition": condition, "role": ask.role}
                for seed, completion in zip(prompt["seeds"], several, strict=True):
                    key = (prompt["prompt_id"], model.policy_hash, decoding.identity, conditioning, seed)
                    yield {
                        "sample_id": content_hash("evaluation", *key),
                        "prompt_id": prompt["prompt_id"],
                        "asked": ask.condition,
                        "condition": condition,
                        "role": ask.role,
                        "text": completion.text,
                        "n_tokens": completion.n_tokens,
                        "finish_reason": completion.finish_reason,
                    }

    def _prompts(self, subject: Subject) -> pl.DataFrame:
        """The prompts of a subject with the seeds of its samples."""
        return self.prompts if subject.prompts is None else subject.prompts

    def _answers(self) -> Iterator[dict[str, Any]]:
        """Rows of SAMPLED: the human answers."""
        for answer in reference_answers(self.prompts).iter_rows(named=True):
            yield {
                "sample_id": content_hash("reference", answer["prompt_id"], answer["text"]),
                "prompt_id": answer["prompt_id"],
                "role": "baseline",
                "text": answer["text"],
                "finish_reason": "stop",
            }

    def kept(
        self,
        part: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, str],
        produce: Callable[[Draft], None],
    ) -> Artifact:
        """The part of an evaluation for these inputs: the existing one, or what ``produce`` creates."""
        key = content_hash(part, VERSIONS[part], settings, inputs)
        return self.stage.store.make(part, key, produce, inputs=inputs, settings=settings)


def _share(report: Callable[..., None], index: int, parts: int, note: str, done: int, total: int) -> None:
    """Reports progress within one of several equal parts."""
    report(index * total + done, parts * total, note)
