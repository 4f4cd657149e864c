"""What can be known before the first costly step: ``textalign validate`` and the start of a run."""

from __future__ import annotations

from collections.abc import Sequence

from resources.policies import base_policy
from textalign_dagster.evaluation import evaluation_prompts
from textalign_dagster.experiment import Experiment
from textalign_dagster.library import Library
from textalign_dagster.prompts import draw_prompts
from textalign_dagster.sources import training_prompts


def preflight(library: Library, name: str, overrides: Sequence[str] = ()) -> list[str]:
    """Checks an experiment and what it refers to; what was found, a line each.

    Raises:
        SettingsError: naming the file, the field and the remedy.
    """
    experiment = library.overridden(name, overrides)
    base = base_policy(experiment)
    found = [
        f"{name}: task {experiment.task.name}, method {experiment.method.name}, "
        f"{experiment.iterations} iterations, seed {experiment.seed}",
        f"base policy: {base.path} ({base.policy_hash})",
        _prompts(experiment),
        f"evaluation: {evaluation_prompts(experiment).height} held-out prompts",
    ]
    control = library.control_of(name)
    found.append(f"null control: {control}" if control else "null control: none")
    return found


def _prompts(experiment: Experiment) -> str:
    prompts = training_prompts(experiment)
    if experiment.prompts.draw == "weighted":
        return f"prompts: {prompts.height}, drawn by weight"
    # The last iteration asks for most: disjoint windows may run out.
    draw_prompts(prompts, experiment.prompts, seed=experiment.seed, iteration=experiment.iterations)
    return f"prompts: {prompts.height}, of which {experiment.prompts.per_iteration} an iteration"
