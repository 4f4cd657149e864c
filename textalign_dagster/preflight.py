"""What can be known before the first costly step: ``textalign validate`` and the start of a run."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Sequence
from pathlib import Path

from resources.policies import BasePolicy, base_policy
from textalign_dagster.conditioning import render
from textalign_dagster.evaluation import evaluation_prompts
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment_files import Library
from textalign_dagster.judging import load_template
from textalign_dagster.prompts import draw_prompts
from textalign_dagster.settings import SettingsError
from textalign_dagster.sources import training_prompts

LONGEST = 50
"""Prompts, the longest in characters, that are tokenised to see whether they fit the model."""


def preflight(library: Library, name: str, overrides: Sequence[str] = ()) -> list[str]:
    """Checks an experiment and what it refers to; what was found, a line each.

    Raises:
        SettingsError: naming the file, the field and the remedy.
    """
    experiment = library.overridden(name, overrides)
    try:
        base = base_policy(experiment)
        found = [
            f"{name}: task {experiment.task.name}, method {experiment.method.name}, "
            f"{experiment.iterations} iterations, seed {experiment.seed}",
            f"base policy: {base.path} ({base.policy_hash})",
            _prompts(experiment),
            f"evaluation: {evaluation_prompts(experiment).height} held-out prompts",
            *_lengths(experiment, base),
            *_judge(experiment),
        ]
    except SettingsError as error:
        raise SettingsError(f"{library.path(name)}: {error}") from None
    control = library.control_of(name)
    found.append(f"null control: {control}" if control else "null control: none")
    return found


def writable(folder: Path) -> None:
    """Checks that a home can be written to.

    Raises:
        SettingsError: it cannot; says how to choose another.
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("x", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise SettingsError(
            f"{folder}: cannot be written to ({error.strerror}); set TEXTALIGN_HOME to a folder that can"
        ) from None


def _judge(experiment: Experiment) -> list[str]:
    """Whether the LLM judge can be asked what the method needs."""
    judge, method = experiment.judge, experiment.method
    if judge is None or method.wants is None:
        return []
    template = load_template(judge.template)
    if template.ask != judge.ask:
        raise SettingsError(
            f"judge.ask: {judge.ask!r}, but the template {judge.template} asks for {template.ask!r}; "
            "make them agree"
        )
    strangers = [bucket for bucket in method.buckets if bucket not in template.labels]
    if judge.ask == "category" and strangers:
        raise SettingsError(
            f"method.categories: {', '.join(strangers)} is no label of the template {judge.template} "
            f"(labels: {', '.join(template.labels)})"
        )
    if judge.api_key_env is not None and not os.environ.get(judge.api_key_env):
        raise SettingsError(
            f"judge.api_key_env: the environment variable {judge.api_key_env} is not set; put the key there "
            "(null: an endpoint without keys)"
        )
    if importlib.util.find_spec("openai") is None:
        raise SettingsError("judge: needs the openai package: pip install -e '.[judges]'")
    return [f"judge: {judge.model} at {judge.endpoint}, template {template.name} ({template.label_version})"]


def _prompts(experiment: Experiment) -> str:
    prompts = training_prompts(experiment)
    if experiment.prompts.draw == "weighted":
        return f"prompts: {prompts.height}, drawn by weight"
    # The last iteration asks for most: disjoint windows may run out.
    draw_prompts(prompts, experiment.prompts, seed=experiment.seed, iteration=experiment.iterations)
    return f"prompts: {prompts.height}, of which {experiment.prompts.per_iteration} an iteration"


def _lengths(experiment: Experiment, base: BasePolicy) -> list[str]:
    """Whether prompts, conditions and samples fit the model's positions: later iterations need most."""
    config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(limit, int):
        return []
    if experiment.training.max_length > limit:
        raise SettingsError(
            f"training.max_length: {experiment.training.max_length}, but {experiment.policy.model} has "
            f"{limit} positions; lower it"
        )
    longest = _longest(experiment, base)
    samples = experiment.sampling.max_new_tokens
    if longest + samples > limit:
        raise SettingsError(
            f"sampling.max_new_tokens: {samples} after a prompt of {longest} tokens (with its condition) is "
            f"more than the {limit} positions of {experiment.policy.model}; lower it, or shorten prompts"
        )
    return [f"lengths: prompts up to {longest} tokens, and {samples} sampled, of {limit} positions"]


def _longest(experiment: Experiment, base: BasePolicy) -> int:
    """Tokens of the longest prompt under the longest condition; 0 where that cannot be told cheaply."""
    path = base.path / "tokenizer.json"
    if not path.is_file():
        return 0  # another kind of tokenizer: sampling will tell
    from tokenizers import Tokenizer  # 30 ms, and only here

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (the library raises nothing more special)
        raise SettingsError(f"policy.model: {path} cannot be read ({error}); fetch it again") from None
    method = experiment.method
    asked = (None, *filter(None, (method.exemplar, *method.probes)))
    prompts = {*training_prompts(experiment)["prompt"], *evaluation_prompts(experiment)["prompt"]}
    texts = [
        render(method.template, condition, prompt)
        for prompt in sorted(prompts, key=len)[-LONGEST:]
        for condition in asked
    ]
    # One more for a token that begins a sequence.
    return 1 + max(len(row.ids) for row in tokenizer.encode_batch(texts, add_special_tokens=False))
