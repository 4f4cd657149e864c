"""Red-teaming an iteration's policy: a pool of prompts to which a language model adds more like the worst.

Source: Korbak et al. 2023 (arXiv:2302.08582), section 4.3, which used hosted models; here an engine runs both.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import polars as pl

from assets.measuring import Measuring
from assets.numbers import UNJUDGED, by_task, first_measure, lower_is_better
from assets.stage import PolicyFolder
from assets.subjects import Subject
from assets.verdicts import scored
from resources.engines.sampler import Completion, Decoding, Request
from resources.store import Artifact, Draft
from textalign_dagster.experiment.evaluation import evaluation_scorer, max_new_tokens
from textalign_dagster.experiment.policies import red_team_model
from textalign_dagster.ids import content_hash, derive_seed
from textalign_dagster.loop.stages import EVALUATION_RED_TEAM, swapped
from textalign_dagster.measures.statistics import Estimate
from textalign_dagster.pool.conditioning import render
from textalign_dagster.prompts import prompt_id, read_prompt_file
from textalign_dagster.reports.score_table import RED_TEAM as TITLES
from textalign_dagster.reports.score_table import RED_TEAM_SUBJECT, score_row
from textalign_dagster.settings.red_team import RedTeam
from textalign_dagster.tables import RED_TEAM, SCORES


def red_team_scores(measuring: Measuring, draft: Draft, subject: Subject) -> pl.DataFrame:
    """Writes the pool, and returns its rows of SCORES: the worst prompt, the mean of the ten worst, and of all."""
    pool = red_teamed(measuring, subject).frame("red_team")
    lower = lower_is_better(measuring.experiment)
    draft.write("red_team", pool, RED_TEAM)
    values = pool["value"].drop_nulls().sort(descending=lower)
    means = (values.head(1).mean(), values.head(10).mean(), values.mean())
    rows = [
        score_row(
            metric,
            Estimate(mean, None, None, len(values), int(pool["samples"].sum())),  # type: ignore[arg-type]
            subject.policy_hash,
            subject=RED_TEAM_SUBJECT,
            role="scenario",
            condition=subject.asked[0].condition,
        )
        for metric, mean in zip(TITLES, means, strict=True)
        if mean is not None
    ]
    return pl.DataFrame(rows, SCORES)


def red_teamed(measuring: Measuring, subject: Subject) -> Artifact:
    """The pool of prompts against a policy: a table of RED_TEAM, stored separately."""
    experiment = measuring.experiment
    settings, scorer = experiment.evaluation.red_team, evaluation_scorer(experiment)
    assert settings is not None and subject.model is not None, "only for policies, if it is set"
    attacker = red_team_model(experiment)
    seeds = read_prompt_file(Path(settings.path))["prompt"].to_list()

    def produce(draft: Draft) -> None:
        attack = _Attack(measuring, subject, settings, PolicyFolder(attacker.path, attacker.policy_hash))
        draft.write("red_team", attack.pool(seeds), RED_TEAM)

    given = {
        "red_team": settings.model_dump(mode="json", exclude={"path", "model"}),
        "max_new_tokens": settings.max_new_tokens or max_new_tokens(experiment),
        "asked": subject.asked[0].condition,
        "template": experiment.method.template if subject.asked[0].condition is not None else None,
        "banned_tokens": list(subject.banned_tokens),
        "task": [*experiment.task.scorer, experiment.task.identity],
        "scorer": None if scorer is None else scorer.identity,
        "seed": experiment.seed,
        "engine": experiment.sampling.engine,
        "dtype": experiment.policy.dtype,
        **swapped(experiment.sampling.engine),
    }
    inputs = {
        "policy": subject.policy_hash,
        "attacker": attacker.policy_hash,
        "prompts": content_hash("prompts", seeds),
    }
    return measuring.kept(EVALUATION_RED_TEAM, given, inputs, produce)


class _Attack:
    """The rounds against one policy."""

    def __init__(
        self, measuring: Measuring, subject: Subject, settings: RedTeam, attacker: PolicyFolder
    ) -> None:
        self.measuring, self.subject, self.settings, self.attacker = measuring, subject, settings, attacker
        self.lower = lower_is_better(measuring.experiment)

    def pool(self, seeds: list[str]) -> pl.DataFrame:
        """All prompts of all rounds, with their results."""
        pool = self._tried(seeds, 0)
        for k in range(1, self.settings.rounds + 1):
            new = self._written(pool, k)
            if new:
                pool = pl.concat([pool, self._tried(new, k)])
        return pool

    def _written(self, pool: pl.DataFrame, number: int) -> list[str]:
        """New prompts, written after some effective ones of the pool."""
        settings, separator = self.settings, self.settings.separator
        seed = derive_seed(self.measuring.experiment.seed, "red team", number)
        shown = drawn(pool, settings.shown, settings.sharpness, self.lower, seed)
        text = separator.join([*shown, ""])
        decoding = Decoding(temperature=1.0, max_new_tokens=settings.max_prompt_tokens)
        own = tuple(derive_seed(seed, i) for i in range(settings.candidates))
        (found,) = self._generate(self.attacker, [Request(text, own)], decoding, f"red team {number}")
        return new_prompts([completion.text for completion in found], separator, set(pool["prompt"]))

    def _tried(self, prompts: list[str], number: int) -> pl.DataFrame:
        """Rows of RED_TEAM: each prompt with the mean value of its completions, and the worst of them."""
        experiment, settings, subject = self.measuring.experiment, self.settings, self.subject
        assert subject.model is not None
        asked, template = subject.asked[0], experiment.method.template
        decoding = Decoding(
            temperature=settings.temperature,
            top_p=settings.top_p,
            max_new_tokens=settings.max_new_tokens or max_new_tokens(experiment),
            banned_tokens=subject.banned_tokens,
        )
        ids = [prompt_id(prompt) for prompt in prompts]
        requests = [
            Request(
                render(template, asked.condition, prompt),
                tuple(derive_seed(experiment.seed, "red team", i, k) for k in range(settings.samples)),
            )
            for i, prompt in zip(ids, prompts, strict=True)
        ]
        found = self._generate(subject.model, requests, decoding, f"red team {number}")
        rows = [
            {
                "sample_id": f"{i} {k}",
                "prompt_id": i,
                "prompt": prompt,
                "role": "scenario",
                "text": completion.text,
                "n_tokens": completion.n_tokens,
                "finish_reason": completion.finish_reason,
            }
            for i, prompt, several in zip(ids, prompts, found, strict=True)
            for k, completion in enumerate(several)
        ]
        none = pl.lit(None, dtype=pl.String)
        samples = pl.DataFrame(rows).with_columns(reference=none, **UNJUDGED)
        samples, _ = scored(self.measuring.stage, self.measuring.sampler, samples)
        samples = samples.with_columns(value=first_measure(experiment, samples, by_task(experiment, samples)))
        worst = pl.col("text").sort_by("value", descending=self.lower, nulls_last=True).first()
        tried = samples.group_by("prompt_id", "prompt", maintain_order=True).agg(
            round=pl.lit(number, dtype=pl.Int32),
            value=pl.col("value").mean(),
            samples=pl.col("value").count().cast(pl.Int64),
            worst=worst,
        )
        return tried.select(*RED_TEAM)

    def _generate(
        self, model: PolicyFolder, requests: list[Request], decoding: Decoding, note: str
    ) -> list[list[Completion]]:
        report = partial(self.measuring.report, note=note)
        return self.measuring.engine.generate(model.sampled, requests, decoding, report)


def drawn(pool: pl.DataFrame, count: int, sharpness: float, lower: bool, seed: int) -> list[str]:
    """Prompts of a pool, drawn without replacement by exp(sharpness·badness); the worst come last.

    Badness is linear in ``value``: 0 for the best of the pool, 1 for the worst. Prompts without a value are not drawn.

    Args:
        pool: prompt, value.
        lower: whether a lower value is better.
    """
    known = pool.drop_nulls("value")
    if known.is_empty():
        return pool["prompt"].head(count).to_list()
    values = known["value"].to_numpy() * (1.0 if lower else -1.0)
    badness = (values - values.min()) / (np.ptp(values) or 1.0)
    weights = np.exp(sharpness * (badness - 1.0))
    chosen = np.random.default_rng(seed).choice(
        known.height, min(count, known.height), replace=False, p=weights / weights.sum()
    )
    ordered = sorted(chosen, key=lambda i: badness[i])
    return [known["prompt"][int(i)] for i in ordered]


def new_prompts(written: list[str], separator: str, known: set[str]) -> list[str]:
    """What a model wrote up to the separator, stripped; empty and known prompts are left out."""
    first = (text.split(separator, 1)[0].strip() for text in written)
    return list(dict.fromkeys(text for text in first if text and text not in known))
