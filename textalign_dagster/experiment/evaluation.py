"""What an evaluation needs: its prompts, the conditions, and what scores and ranks the samples."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import polars as pl

from textalign_dagster.experiment.experiment import REFERENCES, Experiment
from textalign_dagster.experiment.sources import held_out_prompts, training_prompts
from textalign_dagster.ids import content_hash, derive_seed
from textalign_dagster.judging import template_of
from textalign_dagster.methods.base import VARIED
from textalign_dagster.prompts import following, prompt_id, read_prompt_file
from textalign_dagster.scorers import Scorer
from textalign_dagster.settings import SettingsError
from textalign_dagster.settings.judge import Judge
from textalign_dagster.settings.red_team import RedTeam

DISTINCT_BLOCK = 32
"""Samples per block over which distinct-3 is computed; small, so that an evaluation has many blocks to resample."""

Role = Literal["main", "probe", "baseline", "scenario"]


@dataclass(frozen=True)
class Asked:
    """A condition under which a policy is evaluated.

    ``texts`` (prompt_id → text) is set if each prompt has its own condition; ``condition`` then
    names them all.
    """

    condition: str | None
    role: Role
    texts: Mapping[str, str | None] | None = None

    def text(self, prompt_id: str) -> str | None:
        """The condition that the policy reads before a prompt."""
        return self.condition if self.texts is None else self.texts[prompt_id]


def conditions(experiment: Experiment, iteration: int) -> list[Asked]:
    """The condition that the policy is meant for, then the probes; the base policy (0) is not conditioned."""
    if iteration == 0 or experiment.method.exemplar is None:
        return [Asked(None, "main")]
    probes = experiment.method.probes if experiment.evaluation.probe else ()
    return [Asked(experiment.method.exemplar, "main"), *(Asked(probe, "probe") for probe in probes)]


def evaluation_scorer(experiment: Experiment) -> Scorer | None:
    """What scores an evaluation's samples; None: only the task itself."""
    found = experiment.sample_scorer
    if found is not None and not found.measures:
        found = experiment.task.default_scorer
    return experiment.evaluation.scorer or found


def max_new_tokens(experiment: Experiment) -> int:
    """The maximum length of a completion in an evaluation, in tokens."""
    return experiment.evaluation.max_new_tokens or experiment.sampling.max_new_tokens


def evaluation_prompts(experiment: Experiment, samples_per_prompt: int | None = None) -> pl.DataFrame:
    """The held-out prompts with the seeds of their samples: the same in every iteration.

    Args:
        samples_per_prompt: None: as the settings have it.

    Returns:
        Columns prompt_id, prompt, reference, seeds (a list, one seed per sample). All policies and
        conditions get the same seeds, so that differences between them are not due to the seed.

    Raises:
        SettingsError: there are too few prompts, or some are trained on.
    """
    settings = experiment.evaluation
    several = samples_per_prompt or settings.samples_per_prompt
    found = held_out_prompts(experiment)
    prompts = found["prompt"].to_list()
    source = settings.path or f"the held-out prompts of task {experiment.task.name}"
    if settings.path is None and experiment.offline is not None and experiment.offline.held_out is not None:
        source = f"offline.held_out of {experiment.offline.path}"
    _check_held_out(experiment, prompts, "evaluation.path", source)
    if len(prompts) < settings.prompts:
        raise SettingsError(
            f"evaluation.prompts: {settings.prompts} requested, but there are only {len(prompts)} in {source}"
        )
    chosen = found.head(settings.prompts)
    ids = [prompt_id(prompt) for prompt in chosen["prompt"]]
    return chosen.select(
        pl.Series("prompt_id", ids, dtype=pl.String),
        "prompt",
        "reference",
        pl.Series(
            "seeds",
            [[derive_seed(experiment.seed, "evaluation", i, k) for k in range(several)] for i in ids],
        ),
    )


def scenario_prompts(experiment: Experiment, name: str) -> pl.DataFrame:
    """The prompts of a scenario with the seeds of their samples, exactly ``samples`` in all.

    Returns:
        As :func:`evaluation_prompts`. Without a file, each sample is a prompt of its own (the prefix), so
        that the bootstrap resamples samples.

    Raises:
        SettingsError: the file cannot be used, or some of its prompts are trained on.
    """
    scenario = experiment.evaluation.scenarios[name]
    if scenario.path is None:
        texts, references = [scenario.prefix] * scenario.samples, [None] * scenario.samples
        ids = [content_hash("scenario", i) for i in range(scenario.samples)]
    else:
        found = read_prompt_file(Path(scenario.path))
        prompts = found["prompt"].to_list()
        _check_held_out(experiment, prompts, f"evaluation.scenarios.{name}.path", scenario.path)
        texts = [scenario.prefix + text for text in prompts]
        references, ids = found["reference"].to_list(), [prompt_id(text) for text in texts]
    each, more = divmod(scenario.samples, len(texts))
    seeds = [
        [derive_seed(experiment.seed, "scenario", i, k) for k in range(each + (place < more))]
        for place, i in enumerate(ids)
    ]
    frame = pl.DataFrame(
        {
            "prompt_id": pl.Series(ids, dtype=pl.String),
            "prompt": pl.Series(texts, dtype=pl.String),
            "reference": pl.Series(references, dtype=pl.String),
            "seeds": seeds,
        }
    )
    return frame.filter(pl.col("seeds").list.len() > 0)


def _check_held_out(experiment: Experiment, prompts: Sequence[str], field: str, source: str) -> None:
    shared = set(prompts) & set(training_prompts(experiment)["prompt"])
    if shared:
        raise SettingsError(
            f"{field}: {len(shared)} prompts of {source} are trained on too, e.g. {min(shared)!r}; "
            "remove them from one of the files"
        )


def evaluation_source(prompts: pl.DataFrame) -> str:
    """The hash of what :func:`evaluation_prompts` returned, for the key of an evaluation."""
    return content_hash("prompts", [list(row) for row in prompts.select("prompt", "reference").iter_rows()])


def further_prompts(experiment: Experiment) -> dict[str, str]:
    """The files that scenarios, red-teaming and the harness read, as inputs of an evaluation: name → hash."""
    settings = experiment.evaluation
    files = {f"scenario {name}": scenario.path for name, scenario in settings.scenarios.items()}
    if settings.red_team is not None:
        files["red_team"] = settings.red_team.path
    found = {
        f"prompts of {name}": evaluation_source(read_prompt_file(Path(path)))
        for name, path in files.items()
        if path is not None
    }
    if settings.lm_eval is not None and settings.lm_eval.files_hash is not None:
        found["prompts of lm_eval"] = settings.lm_eval.files_hash
    return found


def reference_answers(prompts: pl.DataFrame) -> pl.DataFrame:
    """The human answers as samples: prompt_id, prompt, reference, text; prompts without one are left out.

    A text continues its prompt directly, so a space is put before it if neither has whitespace there.
    """
    return prompts.filter(pl.col("reference").str.strip_chars() != "").select(
        "prompt_id",
        "prompt",
        "reference",
        text=following("reference"),
    )


def check_evaluation(experiment: Experiment) -> None:
    """Checks that the evaluation's settings are compatible, before anything is sampled.

    Raises:
        SettingsError: they are not; the message names the field and the remedy.
    """
    settings = experiment.evaluation
    if experiment.sampling.min_new_tokens > max_new_tokens(experiment):
        raise SettingsError(
            f"evaluation.max_new_tokens: {settings.max_new_tokens}, but sampling.min_new_tokens is "
            f"{experiment.sampling.min_new_tokens}; raise it, or lower that one"
        )
    sampled = experiment.method.trains == "reward model" and not experiment.judged_by_file
    if sampled and settings.samples_per_prompt < 2:
        raise SettingsError(
            "evaluation.samples_per_prompt: 1, but a reward model is measured on pairs of a prompt's samples; raise it "
            "to 2 or more"
        )
    for name, scenario in settings.scenarios.items():
        scenario_prompts(experiment, name)
        longest = scenario.max_new_tokens or max_new_tokens(experiment)
        if scenario.min_new_tokens > longest:
            raise SettingsError(
                f"evaluation.scenarios.{name}.min_new_tokens: {scenario.min_new_tokens}, but completions have "
                f"{longest} tokens at most; lower it, or raise max_new_tokens"
            )
    if (harness := settings.lm_eval) is not None and harness.path and not Path(harness.path).is_dir():
        raise SettingsError(
            f"evaluation.lm_eval.path: {harness.path}: no such folder; give the one with your task files"
        )
    if settings.red_team is not None:
        _check_red_team(experiment, settings.red_team)
    if settings.best_of_n is not None:
        _check_ranker(experiment)
    prompts = evaluation_prompts(experiment)
    answered = reference_answers(prompts).height
    if settings.rouge and not answered:
        raise SettingsError(
            "evaluation.rouge: the held-out prompts have no references; give a file with a column `reference` as "
            "evaluation.path, or remove it"
        )
    for name, model in settings.baselines.items():
        if model == REFERENCES and not answered:
            raise SettingsError(
                f"evaluation.baselines.{name}: the held-out prompts have no references; give a file with a "
                "column `reference` as evaluation.path, or remove this baseline"
            )
    if settings.scorer is not None and not settings.scorer.measures:
        raise SettingsError(
            f"evaluation.scorer: {settings.scorer.name} returns no numbers for an evaluation's samples; "
            "choose another scorer"
        )
    for field, judge in experiment.evaluating_judges.items():
        _check_judge(field, judge, answered)


def _check_red_team(experiment: Experiment, settings: RedTeam) -> None:
    read_prompt_file(Path(settings.path))
    if experiment.method.exemplar == VARIED:
        raise SettingsError(
            f"evaluation.red_team: method {experiment.method.name} gives each prompt its own condition "
            "(`varied`), and new prompts have none; remove it"
        )
    scores = evaluation_scorer(experiment) is not None
    if experiment.task.judged_by_others and not scores:
        raise SettingsError(
            f"evaluation.red_team: task {experiment.task.name} has no scorer of its own, and red-teaming measures "
            "completions only by scorers; set evaluation.scorer"
        )


def ranker(experiment: Experiment) -> Scorer | None:
    """The scorer that ranks the samples of best-of-n unless a judge does; None: the task's reward."""
    settings = experiment.evaluation.best_of_n
    return (settings and settings.scorer) or experiment.sample_scorer


def _check_ranker(experiment: Experiment) -> None:
    found, settings = ranker(experiment), experiment.evaluation.best_of_n
    if settings is not None and settings.judge is not None:
        return
    if found is not None and not found.measures:
        raise SettingsError(
            f"evaluation.best_of_n.scorer: {found.name} returns no numbers to rank samples of the base policy by; "
            "choose another scorer"
        )
    if found is None and "reward" not in experiment.task.kinds:
        raise SettingsError(
            f"evaluation.best_of_n.scorer: missing; task {experiment.task.name} has no reward of its own to rank by"
        )


def _check_judge(field: str, judge: Judge, answered: int) -> None:
    try:
        template_of(judge)
    except SettingsError as error:
        where = field.removesuffix("judge") if str(error).startswith("judge.") else f"{field}: "
        raise SettingsError(f"{where}{error}") from None
    if judge.ask == "ranking" and field == "evaluation.judge":
        raise SettingsError(
            "evaluation.judge.ask: ranking compares a policy's samples with each other, which says nothing about "
            "the policy; set it to `win` (against the references) or `rating`"
        )
    if judge.ask == "win" and not answered:
        raise SettingsError(
            f"{field}.ask: win compares with references, and the held-out prompts have none; give a "
            "file with a column `reference` as evaluation.path, or set it to `rating`"
        )
    if judge.api_key_env is not None and not os.environ.get(judge.api_key_env):
        raise SettingsError(
            f"{field}.api_key_env: the environment variable {judge.api_key_env} is not set; put the "
            "key there (null: an endpoint without keys)"
        )
