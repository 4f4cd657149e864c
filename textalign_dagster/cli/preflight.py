"""Checks before the first costly step, for ``textalign validate`` and the start of a run."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from resources.compute.pods import check_kubernetes
from resources.compute.slurm import check_slurm
from resources.store import ArtifactError, ArtifactStore
from textalign_dagster.cli.engine_checks import check_engine, check_structured
from textalign_dagster.cli.probes import check_installed, probe
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.evaluation import (
    check_evaluation,
    evaluation_prompts,
    max_new_tokens,
    scenario_prompts,
)
from textalign_dagster.experiment.files import Library, store_url
from textalign_dagster.experiment.offline import summary
from textalign_dagster.experiment.policies import BasePolicy, base_policy, evaluation_models
from textalign_dagster.experiment.sources import task_of, training_prompts
from textalign_dagster.judging import Template, template_of
from textalign_dagster.pool.conditioning import render
from textalign_dagster.prompts import DEFAULT_DRAW, draw_prompts
from textalign_dagster.scorers import JudgeModel
from textalign_dagster.settings import SettingsError
from textalign_dagster.settings.judge import Judge
from training.acceleration import accelerators, check_training
from training.settings import Training

LONGEST = 50
"""How many prompts, the longest in characters, are tokenised to check that they fit the model."""
TASKS_PROBE = """
import json
from lm_eval.tasks import TaskManager
known = TaskManager(include_path={path!r})
print(json.dumps({{"unknown": [task for task in {tasks!r} if not known.match_tasks([task])]}}))
"""


def preflight(library: Library, name: str, overrides: Sequence[str] = ()) -> list[str]:
    """Checks an experiment and what it refers to; returns the findings, a line each.

    Raises:
        SettingsError: all problems, a line each, with file, field and remedy.
    """
    experiment = library.overridden(name, overrides)
    found = [
        f"{name}: task {experiment.task.name}, method {experiment.method.name}, "
        f"{experiment.iterations} iterations, seed {experiment.seed}"
    ]
    problems: list[str] = []

    def check(what: Callable[..., Iterable[str]], *arguments: object) -> None:
        try:
            found.extend(what(*arguments))
        except SettingsError as error:
            if str(error) not in problems:  # several checks may read the same prompts
                problems.append(str(error))

    base: BasePolicy | None = None
    try:
        base = base_policy(experiment)
        found.append(f"base policy: {base.path} ({base.policy_hash})")
    except SettingsError as error:
        problems.append(str(error))
    check(_offline, experiment)
    check(_prompts, experiment)
    if experiment.prompts.path is None:
        check(lambda: task_of(experiment).notes)
    check(_evaluation, experiment)
    if base is not None:
        check(_lengths, experiment, base)
        check(check_engine, experiment, base)
        check(_training, experiment, base)
    check(check_structured, experiment)
    check(_scorers, experiment)
    check(_judge, experiment)
    try:
        found.append(f"null control: {library.control_of(name) or 'none'}")
    except SettingsError as error:  # its message names the file
        raise SettingsError("\n".join([*_at(library.path(name), problems), str(error)])) from None
    if problems:
        raise SettingsError("\n".join(_at(library.path(name), problems)))
    return found


def _at(path: Path, problems: Iterable[str]) -> list[str]:
    return [f"{path}: {problem}" for problem in problems]


def writable(folder: Path) -> None:
    """Checks that a home folder is writable.

    Raises:
        SettingsError: it is not; the message says how to choose another.
    """
    probe = folder / f".probe-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("x", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise SettingsError(
            f"{folder}: cannot be written to ({error.strerror}); set TEXTALIGN_HOME to a writable folder"
        ) from None


def _scorers(experiment: Experiment) -> list[str]:
    """Checks that the scorers' models and files are available."""
    from resources.judge_models import check_judge_model
    from resources.rewards.scoring import inspect_scorer
    from resources.rewards.trained import trained

    scorers, own = {}, experiment.sample_scorer
    if own is not None and experiment.judge is None and experiment.method.wants is not None:
        scorers["scorer"] = own
    if experiment.evaluation.scorer is not None:
        scorers["evaluation.scorer"] = experiment.evaluation.scorer
    if experiment.evaluation.best_of_n is not None and experiment.evaluation.best_of_n.scorer is not None:
        scorers["evaluation.best_of_n.scorer"] = experiment.evaluation.best_of_n.scorer
    for field, scorer in scorers.items():
        try:
            trained(scorer, ArtifactStore(store_url()))
        except ArtifactError as error:
            raise SettingsError(f"{field}.{error}") from None
        if isinstance(scorer, JudgeModel):
            check_judge_model(scorer, ArtifactStore(store_url()))
    return [inspect_scorer(scorer, field) for field, scorer in scorers.items()]


def _judge(experiment: Experiment) -> list[str]:
    """Checks that the LLM judge gives the feedback that the method needs."""
    judge, method = experiment.judge, experiment.method
    if judge is None or method.wants is None:
        return []
    template = template_of(judge)
    _comparisons(judge, template, experiment)
    unknown = [bucket for bucket in method.buckets if bucket not in template.labels]
    if judge.ask == "category" and unknown:
        raise SettingsError(
            f"method.categories: {', '.join(unknown)} is not a label of the template {judge.template} "
            f"(labels: {', '.join(template.labels)})"
        )
    unlisted = [label for label in template.labels if label not in method.buckets]
    if judge.ask == "category" and unlisted:
        raise SettingsError(
            f"method.categories: the template {judge.template} also sorts into {', '.join(unlisted)}, which is "
            "not listed: such samples would be judged but never trained on; list all its labels"
        )
    if judge.api_key_env is not None and not os.environ.get(judge.api_key_env):
        raise SettingsError(
            f"judge.api_key_env: the environment variable {judge.api_key_env} is not set; put the key there "
            "(null: an endpoint without keys)"
        )
    check_installed("judge", "openai", "judges")
    return [f"judge: {judge.model} at {judge.endpoint}, template {template.name} ({template.label_version})"]


def _comparisons(judge: Judge, template: Template, experiment: Experiment) -> None:
    """Checks that there is something to compare samples with."""
    samples, sampled = experiment.sampling.samples_per_prompt, experiment.offline is None
    if sampled and judge.ask == "ranking" and samples == 1:
        raise SettingsError(
            "judge.ask: ranking compares the samples of a prompt, and there is only one; raise "
            "sampling.samples_per_prompt to 2 or more"
        )
    if sampled and judge.pairs is not None and 2 * judge.pairs < samples:
        raise SettingsError(
            f"judge.pairs: {judge.pairs} pairs leave out some of the {samples} samples of a prompt "
            f"(sampling.samples_per_prompt); raise it to {(samples + 1) // 2} or more"
        )
    compares = judge.ask == "win" or "reference" in template.item_fields
    if compares and training_prompts(experiment)["reference"].drop_nulls().is_empty():
        raise SettingsError(
            f"judge.template: {template.name} compares with references, and the prompts have none; give a file "
            "with a column `reference` in prompts.path, or choose another template"
        )


def _evaluation(experiment: Experiment) -> list[str]:
    check_evaluation(experiment)
    if experiment.evaluation.text_statistics:
        check_installed("evaluation.text_statistics", "sacrebleu", "metrics")
    for field in experiment.evaluating_judges:
        check_installed(field, "openai", "judges")
    if (harness := experiment.evaluation.lm_eval) is not None:
        if importlib.util.find_spec("lm_eval") is None:
            raise SettingsError(
                "evaluation.lm_eval: needs lm-evaluation-harness: pip install -e '.[harness]'"
            )
        found = probe(TASKS_PROBE.format(path=harness.path, tasks=harness.tasks))  # takes seconds
        if unknown := found.get("unknown"):
            raise SettingsError(
                f"evaluation.lm_eval.tasks: {', '.join(unknown)}: no such task; `lm-eval ls tasks` lists them"
            )
    models = "".join(f", {field}" for field in evaluation_models(experiment))
    return [f"evaluation: {evaluation_prompts(experiment).height} held-out prompts{models}"]


def _offline(experiment: Experiment) -> list[str]:
    """What the file of responses holds."""
    if experiment.offline is None:
        return []
    return [f"offline: {experiment.offline.path}: {summary(experiment, task_of(experiment))}"]


def _prompts(experiment: Experiment) -> list[str]:
    prompts = training_prompts(experiment)
    if experiment.prompts.draw == "weighted":
        return [f"prompts: {prompts.height}, drawn by weight"]
    # The last iteration needs the most: disjoint windows may run out.
    draw_prompts(prompts, experiment.prompts, seed=experiment.seed, iteration=experiment.iterations)
    drawn = experiment.prompts.per_iteration or min(prompts.height, DEFAULT_DRAW)
    return [f"prompts: {prompts.height}, of which {drawn} per iteration"]


def _training(experiment: Experiment, base: BasePolicy) -> list[str]:
    """Checks that this machine can train as the experiment is configured."""
    training = experiment.training
    local = training.launcher == "local"
    # What a cluster's nodes have cannot be checked here.
    found = check_training(training, dtype=experiment.policy.dtype, devices=accelerators if local else None)
    where = [] if local else [_cluster(training)]
    if training.packing:
        _packing(base.path)
    config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    blocks = config.get("num_hidden_layers") or config.get("n_layer")
    last = training.trainable_layers
    if isinstance(last, int) and isinstance(blocks, int) and last > blocks:
        raise SettingsError(
            f"training.trainable_layers: {last}, but {experiment.policy.model} has {blocks} blocks; lower it"
        )
    if found is None and training.processes == 1:
        return where
    return [*where, f"training: {training.processes} processes, {found.kind if found else 'data parallel'}"]


def _cluster(training: Training) -> str:
    """Checks that the cluster answers and has what the experiment requests."""
    if training.launcher == "slurm":
        return check_slurm(training.slurm)
    return check_kubernetes(training.k8s)


def _packing(policy: Path) -> None:
    """Checks that the policy's architecture can read packed rows; a separate process loads torch for it."""
    code = "import json; from training.data.packing import refusal; "
    why = probe(f"{code}print(json.dumps({{'why': refusal({str(policy)!r})}}))").get("why")
    if why:
        raise SettingsError(why)


def _lengths(experiment: Experiment, base: BasePolicy) -> list[str]:
    """Checks that prompts, conditions and samples fit the model's positions, in later iterations too."""
    config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(limit, int):
        return []
    if (experiment.training.max_length or 0) > limit:
        raise SettingsError(
            f"training.max_length: {experiment.training.max_length}, but {experiment.policy.model} has "
            f"{limit} positions; lower it, or leave it out"
        )
    prompts = {*training_prompts(experiment)["prompt"], *evaluation_prompts(experiment)["prompt"]}
    longest = _longest(experiment, base, prompts)
    samples = max(experiment.sampling.max_new_tokens, max_new_tokens(experiment))
    if longest + samples > limit:
        raise SettingsError(
            f"sampling.max_new_tokens: {samples} after a prompt of {longest} tokens (with its condition) is "
            f"more than the {limit} positions of {experiment.policy.model}; lower it, or shorten prompts"
        )
    for name, scenario in experiment.evaluation.scenarios.items():
        shown = _longest(experiment, base, set(scenario_prompts(experiment, name)["prompt"]))
        sampled = scenario.max_new_tokens or max_new_tokens(experiment)
        if shown + sampled > limit:
            raise SettingsError(
                f"evaluation.scenarios.{name}.max_new_tokens: {sampled} after a prompt of {shown} tokens is more than "
                f"the {limit} positions of {experiment.policy.model}; lower it, or shorten its prompts"
            )
    return [f"lengths: prompts up to {longest} tokens, and {samples} sampled, of {limit} positions"]


def _longest(experiment: Experiment, base: BasePolicy, prompts: set[str]) -> int:
    """Tokens of the longest prompt under the longest condition; 0 if the model has no tokenizer.json."""
    path = base.path / "tokenizer.json"
    if not path.is_file():
        return 0  # another kind of tokenizer: sampling reports it
    from tokenizers import Tokenizer  # 30 ms, and only here

    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # noqa: BLE001 (the library raises nothing more specific)
        raise SettingsError(f"policy.model: {path} cannot be read ({error}); fetch it again") from None
    method = experiment.method
    conditions = (None, *filter(None, (method.exemplar, *method.probes)))
    texts = [
        render(method.template, condition, prompt)
        for prompt in sorted(prompts, key=len)[-LONGEST:]
        for condition in conditions
    ]
    # One more for a beginning-of-sequence token.
    return 1 + max(len(row.ids) for row in tokenizer.encode_batch(texts, add_special_tokens=False))
