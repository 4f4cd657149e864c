"""The stages of an iteration, and for each the settings its output follows from.

An artifact's key is the hash of these settings, of its inputs' keys and of the stage's version:
what does not matter to a stage is not in its settings, so a change elsewhere leaves it as it is,
and experiments that agree on it (a method and its null control, say) share one artifact.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from textalign_dagster.experiment import Experiment
from textalign_dagster.ids import canonical_json, content_hash
from textalign_dagster.judge_settings import Judge
from textalign_dagster.judging import PARSER_VERSION, load_template

STAGES = ("prompt_draws", "generations", "feedback", "datapool", "checkpoint", "evaluation")

VERSIONS = {
    "prompt_draws": 1,
    "generations": 1,
    "feedback": 1,
    "datapool": 1,
    "checkpoint": 1,
    "evaluation": 1,
}
"""Raised when a change of code changes what a stage makes of the same inputs and settings."""


def stage_settings(experiment: Experiment, stage: str, iteration: int) -> dict[str, Any]:
    """What of the experiment matters to a stage in an iteration, as plain JSON.

    Iteration 0 has an evaluation only: of the untouched base policy, without a condition.
    """
    plain = experiment.model_dump(mode="json")
    method = experiment.method
    # Iteration 1 samples before there is any feedback to ask for; no method shows in it.
    conditioning = {"template": method.template, "ask_for": method.exemplar}
    unconditioned = {"template": None, "ask_for": None}
    if stage == "prompt_draws":
        # Where a file of prompts lies does not matter; what it holds is an input.
        prompts = _without(plain["prompts"], "path")
        chosen = {"task": plain["task"], "prompts": prompts, "seed": experiment.seed}
    elif stage == "generations":
        chosen = {
            "sampling": _without(plain["sampling"], "batch_size"),
            "dtype": experiment.policy.dtype,
            **(conditioning if iteration > 1 and method.exemplar is not None else unconditioned),
        }
    elif stage == "feedback":
        chosen = {"task": plain["task"], "scorer": experiment.task.scorer, "kind": method.wants}
        if experiment.judge is not None and method.wants is not None:
            chosen = {"kind": method.wants, "judge": judge_identity(experiment.judge)}
    elif stage == "datapool":
        chosen = {
            "method": plain["method"],
            "datapool": plain["datapool"],
            "max_new_tokens": experiment.sampling.max_new_tokens,
            "seed": experiment.seed,
        }
    elif stage == "checkpoint":
        chosen = {
            "training": plain["training"],
            "template": method.template,
            "special_tokens": method.special_tokens,
            "dtype": experiment.policy.dtype,
            "seed": experiment.seed,
        }
    elif stage == "evaluation":
        asked = iteration > 0 and method.exemplar is not None
        probes = method.probes if asked and experiment.evaluation.probe else ()
        chosen = {
            "task": plain["task"],
            "scorer": experiment.task.scorer,
            "evaluation": _without(plain["evaluation"], "probe", "path"),
            "sampling": {
                field: plain["sampling"][field]
                for field in ("engine", "max_new_tokens", "min_new_tokens", "ignore_eos")
            },
            "dtype": experiment.policy.dtype,
            "seed": experiment.seed,
            "probes": list(probes),
            **(conditioning if asked else unconditioned),
        }
    else:
        raise ValueError(f"unknown stage {stage!r}; one of {', '.join(STAGES)}")
    return dict(json.loads(canonical_json(chosen)))  # as it comes back from a manifest: no tuples


def judge_identity(judge: Judge) -> dict[str, Any]:
    """What a judge's verdicts follow from: not how fast, how dearly or with which key it is asked."""
    return {
        "model": judge.model,
        "endpoint": judge.endpoint,
        "template": load_template(judge.template).content_hash,
        "decoding": judge.decoding.model_dump(mode="json"),
        "structured": judge.structured,
        "parser": PARSER_VERSION,
    }


def artifact_key(stage: str, settings: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """The key under which a stage's output is kept."""
    return content_hash(stage, VERSIONS[stage], dict(settings), dict(inputs))


def _without(section: dict[str, Any], *fields: str) -> dict[str, Any]:
    return {name: value for name, value in section.items() if name not in fields}
