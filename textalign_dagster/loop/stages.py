"""The stages of an iteration, and the settings that the output of each depends on.

An artifact's key is the hash of these settings, of its inputs' keys and of the stage's version:
settings that do not affect a stage are not in its key, so changing them does not make it stale, and
experiments that agree on the others (a method and its null control, say) share one artifact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.evaluation import evaluation_scorer, max_new_tokens, ranker
from textalign_dagster.experiment.offline import identity as offline_identity
from textalign_dagster.experiment.policies import evaluation_models
from textalign_dagster.ids import canonical_json, content_hash
from textalign_dagster.judging import PARSER_VERSION, template_of
from textalign_dagster.prompts import DEFAULT_DRAW
from textalign_dagster.settings.judge import Judge
from textalign_dagster.settings.structured import content_of
from training.acceleration import accelerate_config
from training.settings import DEFAULT_LENGTH, WITHOUT_EFFECT, Training

EVALUATION_SAMPLING, EVALUATION_FLUENCY = "evaluation_sampling", "evaluation_fluency"
EVALUATION_DIVERGENCE = "evaluation_divergence"
EVALUATION_RED_TEAM = "evaluation_red_team"
EVALUATION_LM_EVAL = "evaluation_lm_eval"
"""Parts of an evaluation that are cached for later ones, under their own names."""

SAMPLED_CHUNK = "sampled_chunk"
"""Completions of an unfinished sampling, from which the next attempt resumes."""

REFERENCE = "reference_log_probs"
"""Log-probabilities under a reference policy, shared by training runs."""

STAGES = ("prompt_draws", "generations", "feedback", "datapool", "checkpoint", "evaluation")

VERSIONS = {
    "prompt_draws": 1,
    "generations": 1,
    "feedback": 1,
    "datapool": 1,
    "checkpoint": 1,
    "evaluation": 1,
}
"""Incremented when a code change alters a stage's output for the same inputs and settings."""


SWAPPED = {"vllm": 2}
"""Incremented when an engine turned out to use wrong weights after a weight swap.

vllm 2: vLLM's CPU build kept the first model's output head where embeddings are tied, so from iteration 2 on it
sampled from a mixture of two policies. Keys record neither the device nor tied embeddings, so all samples that
`engine: vllm` drew from swapped-in weights count as stale.
"""


def swapped(engine: str) -> dict[str, int]:
    """The part of artifact keys that marks the output of an engine after a weight swap."""
    return {"swapped_weights": SWAPPED[engine]} if engine in SWAPPED else {}


def stage_settings(experiment: Experiment, stage: str, iteration: int) -> dict[str, Any]:
    """The settings of the experiment that affect a stage in an iteration, as plain JSON.

    Iteration 0 has only an evaluation: of the untouched base policy, without a condition.
    """
    plain = experiment.model_dump(mode="json")
    method = experiment.method
    # Iteration 1 samples before any feedback exists to condition on, so the method does not matter.
    conditioning = {"template": method.template, "ask_for": method.exemplar}
    unconditioned = {"template": None, "ask_for": None}
    if stage == "prompt_draws":
        # The path of a prompt file does not matter; its content is an input.
        prompts = _without(plain["prompts"], "path")
        # Whether there are fewer follows from the prompts, which are an input.
        prompts["per_iteration"] = prompts["per_iteration"] or DEFAULT_DRAW
        chosen = {"task": experiment.task.identity, "prompts": prompts, "seed": experiment.seed}
    elif stage == "generations" and experiment.offline is not None:
        chosen = {"offline": offline_identity(experiment.offline), "task": experiment.task.identity}
    elif stage == "generations":
        chosen = {
            # How and where the engine runs does not change the samples.
            "sampling": {
                **_without(
                    plain["sampling"],
                    *("batch_size", "chunk", "vllm", "endpoints", "launcher", "slurm", "ray", "k8s"),
                    *("structured", "adapters"),
                ),
                **experiment.sampling.served,
                **_structured(experiment),
            },
            "dtype": experiment.policy.dtype,
            **(swapped(experiment.sampling.engine) if iteration > 1 else {}),
            **(conditioning if iteration > 1 and method.exemplar is not None else unconditioned),
        }
    elif stage == "feedback":
        chosen = {"kind": method.wants, **_feedback(experiment, experiment.task.identity, iteration)}
    elif stage == "datapool":
        chosen = {
            # Settings added later are left out if they change nothing, so that earlier pools keep their keys.
            "method": method.identity,
            "datapool": {k: v for k, v in plain["datapool"].items() if (k, v) != ("weights", None)},
            # Responses from a file are not truncated.
            "max_new_tokens": experiment.sampling.max_new_tokens if experiment.offline is None else None,
            "seed": experiment.seed,
        }
    elif stage == "checkpoint":
        chosen = {
            "training": _training(experiment.training, plain["training"]),
            "template": method.template,
            "special_tokens": method.special_tokens,
            "dtype": experiment.policy.dtype,
            "seed": experiment.seed,
        }
    elif stage == "evaluation":
        conditioned = iteration > 0 and method.exemplar is not None
        probes = method.probes if conditioned and experiment.evaluation.probe else ()
        chosen = {
            "task": experiment.task.identity,
            "scorer": experiment.task.scorer,
            "evaluation": _evaluation(experiment, plain["evaluation"], iteration),
            "sampling": {
                **{field: plain["sampling"][field] for field in ("engine", "min_new_tokens", "ignore_eos")},
                "max_new_tokens": max_new_tokens(experiment),
                **experiment.sampling.served,
                **_structured(experiment),
            },
            "dtype": experiment.policy.dtype,
            "seed": experiment.seed,
            "probes": list(probes),
            # A reward model is compared with the feedback that it was trained on.
            **(
                {"feedback": _feedback(experiment, experiment.task.identity, iteration)}
                if iteration > 0 and method.trains == "reward model"
                else {}
            ),
            **(swapped(experiment.sampling.engine) if iteration > 0 else {}),
            **(conditioning if conditioned else unconditioned),
        }
    else:
        raise ValueError(f"unknown stage {stage!r}; one of {', '.join(STAGES)}")
    return dict(json.loads(canonical_json(chosen)))  # as read back from a manifest: no tuples


def _structured(experiment: Experiment) -> dict[str, Any]:
    """The structure required of completions, if any: a schema by its content."""
    content = content_of(experiment.sampling.structured)
    return {} if content is None else {"structured": content}


def _training(settings: Training, section: dict[str, Any]) -> dict[str, Any]:
    """The settings of the section ``training`` that matter; an accelerate configuration by its content."""
    given = _without(section, "accelerate", *WITHOUT_EFFECT) | {"objective": settings.objective.identity()}
    if given["max_length"] is None:
        given["max_length"] = DEFAULT_LENGTH  # a model with a shorter context is another input
    # Added later: at these values they are left out, so that earlier checkpoints keep their keys.
    for field, without in (
        ("packing", False),
        ("optimizer", "adamw"),
        ("density_ratio", None),
        ("block", None),
    ):
        if given[field] == without:
            del given[field]
    if settings.lora is not None and settings.lora.adapter == "new":
        given["lora"] = _without(given["lora"], "adapter")
    if settings.accelerate is not None:
        given["accelerate"] = accelerate_config(settings.accelerate).identity
    return given


def _evaluation(experiment: Experiment, section: dict[str, Any], iteration: int) -> dict[str, Any]:
    """The settings of the section ``evaluation`` that matter; models, scorer and judge, if given, by identity."""
    settings, scorer = experiment.evaluation, evaluation_scorer(experiment)
    given: dict[str, Any] = {}
    if scorer is not None:
        given["scorer"] = scorer.identity
    if settings.judge is not None:
        given["judge"] = judge_identity(settings.judge)
    for field, model in evaluation_models(experiment).items():
        # Baselines go with iteration 0, which is evaluated with iteration 1.
        if iteration <= 1 or not field.startswith("baselines."):
            given[field] = model
    if settings.best_of_n is not None and iteration <= 1:  # with iteration 0, like baselines
        by, judge = ranker(experiment), settings.best_of_n.judge
        task = [*experiment.task.scorer, experiment.task.identity]
        scorer_or_task = task if by is None else by.identity
        given["best_of_n"] = {
            **_without(section["best_of_n"], "scorer", "judge"),
            "ranker": scorer_or_task if judge is None else judge_identity(judge),
        }
    if settings.scenarios:  # their files are inputs, identified by content
        given["scenarios"] = {
            name: scenario.model_dump(mode="json", exclude={"path"})
            for name, scenario in settings.scenarios.items()
        }
    if settings.red_team is not None:
        given["red_team"] = settings.red_team.model_dump(mode="json", exclude={"path", "model"})
    if settings.lm_eval is not None:
        given["lm_eval"] = settings.lm_eval.model_dump(mode="json", exclude={"path", "batch_size"})
    for field in ("text_statistics", "rouge"):  # earlier evaluations lack these settings
        if not getattr(settings, field):
            section = _without(section, field)
    by_identity = (
        "best_of_n",
        "max_new_tokens",
        "scorer",
        "judge",
        "fluency_model",
        "kl_reference",
        "baselines",
        "scenarios",
        "red_team",
        "lm_eval",
    )
    return {**_without(section, "probe", "path", *by_identity), **given}


def _feedback(experiment: Experiment, task: dict[str, Any], iteration: int) -> dict[str, Any]:
    """What judges the samples; see `resources.feedback_sources`."""
    scorer, needed = experiment.sample_scorer, experiment.method.wants is not None
    if needed and experiment.offline is not None and experiment.judged_by_file:
        return {"offline": offline_identity(experiment.offline)}
    if needed and experiment.judge is not None:
        return {"judge": judge_identity(experiment.judge)}
    if needed and scorer is not None:
        return {"scorer": scorer.identity_at(iteration)}
    return {"task": task, "scorer": experiment.task.scorer}


def judge_identity(judge: Judge) -> dict[str, Any]:
    """The settings that a judge's verdicts depend on: not its rate limits, its prices or its API key."""
    return {
        "model": judge.model,
        "endpoint": judge.endpoint,
        "template": template_of(judge).content_hash,  # includes its ask and scale
        "group": judge.group,
        "pairs": judge.pairs,
        "repeats": judge.repeats,
        "decoding": judge.decoding.model_dump(mode="json"),
        "structured": judge.structured,
        "parser": PARSER_VERSION,
    }


def artifact_key(stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The key under which a stage's output is stored."""
    return content_hash(stage, VERSIONS[stage], dict(settings), dict(inputs))


def _without(section: dict[str, Any], *fields: str) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name not in fields}
