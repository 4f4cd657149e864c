"""Experiments so small that the whole loop takes seconds, and ``textalign`` in a separate process."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import forked
from textalign_dagster.experiment import Experiment
from textalign_dagster.methods import ForwardPrediction
from textalign_dagster.scorers import PIIScorer
from textalign_dagster.settings import merge, nested, parse_override, write_yaml
from textalign_dagster.tasks.dataset import DatasetTask

PROJECT = Path(__file__).resolve().parent.parent

OVERRIDES = (
    "iterations=2",
    "prompts.per_iteration=4",
    "sampling.samples_per_prompt=3",
    "sampling.max_new_tokens=8",
    "sampling.batch_size=32",
    "datapool.samples=8",
    "datapool.max_tokens=9",
    "training.batch_size=2",
    "evaluation.prompts=6",
    "evaluation.samples_per_prompt=1",
    "evaluation.resamples=100",
    "checks.min_diversity=0",
    "checks.max_duplicates=1",
    "checks.max_empty=1",
)
"""Overrides that make a shipped experiment tiny; its numbers then mean nothing."""


@dataclass(frozen=True)
class ToyModels:
    """Folders of the models that stand in for those on the hub (`tests.toy_models`)."""

    policy: Path
    classifier: Path
    reward_model: Path
    corpus: Path  # documents whose sentences are scored


def shipped_overrides(experiment: Experiment, models: ToyModels, judge_url: str) -> list[str]:
    """Overrides that make a shipped experiment tiny, without hub, GPU or LLM: embedded prompts, random models."""
    overrides = list(OVERRIDES)
    # With fewer tokens no sample has a complete line, and all get the same feedback.
    if experiment.task.name == "pep8":
        overrides += ["sampling.max_new_tokens=24", "datapool.max_tokens=25"]
    if experiment.method.read_together(3) > 2:  # a group is three samples
        overrides[overrides.index("training.batch_size=2")] = "training.batch_size=4"
    if isinstance(experiment.method, ForwardPrediction):  # a judge must learn to write feedback, and to stop
        overrides.append("training.epochs=20")
    if experiment.method.trains == "reward model":  # it is evaluated on pairs of samples of a prompt
        overrides[overrides.index("evaluation.samples_per_prompt=1")] = "evaluation.samples_per_prompt=2"
    if experiment.datapool.draws_all:
        overrides.remove("datapool.samples=8")
    elif experiment.datapool.samples_per_bucket is not None:
        overrides[overrides.index("datapool.samples=8")] = "datapool.samples_per_bucket=1"
    if experiment.corpus is not None:  # 16 of its documents
        overrides.append("offline.shard=4")
        if not Path(experiment.corpus.path).is_file():  # it is on the hub
            overrides += [f"offline.path={models.corpus}", "training.block=32"]
    overrides += [
        f"evaluation.scenarios.{name}={{samples: 26, max_new_tokens: 8, min_new_tokens: 2}}"
        for name in experiment.evaluation.scenarios
    ]
    if experiment.evaluation.kl_reference is not None:
        overrides.append("evaluation.kl_reference=base")
    if experiment.judge is not None:
        overrides.append(f"judge.base_url={judge_url}")
    if experiment.evaluation.judge is not None:
        overrides.append(f"evaluation.judge.base_url={judge_url}")
    for field, scorer in (("scorer", experiment.scorer), ("evaluation.scorer", experiment.evaluation.scorer)):
        if scorer is not None and scorer.name == "classifier":
            overrides += [f"{field}.model={models.classifier}", f"{field}.label=toxic"]
        if scorer is not None and scorer.name == "reward_model" and scorer.trained is None:
            overrides += [f"{field}.model={models.reward_model}", f"{field}.weights={models.reward_model}"]
            overrides.append(f"{field}.dtype=float32")
        if isinstance(scorer, PIIScorer) and scorer.names is not None:
            overrides.append(f"{field}.names=null")
    overrides += [
        f"evaluation.baselines.{baseline}={models.policy}"
        for baseline, model in experiment.evaluation.baselines.items()
        if model != "references"
    ]
    if experiment.evaluation.max_new_tokens is not None:
        overrides.append(f"evaluation.max_new_tokens={24 if experiment.task.name == 'pep8' else 8}")
    if experiment.evaluation.fluency_model is not None:
        overrides.append(f"evaluation.fluency_model={models.policy}")
    if isinstance(experiment.task, DatasetTask):
        overrides += ["task.data.hub=null", "task.data.held_out=null"]
    if experiment.policy.model not in experiment.task.builtin_policies:
        overrides += [
            f"policy.model={next(iter(experiment.task.builtin_policies), models.policy)}",
            "policy.dtype=float32",
            "sampling.engine=transformers",
            "training.processes=1",
            "training.accelerate=null",
            "training.mixed_precision=no",
        ]
        if experiment.training.lora is not None:  # its target modules belong to another architecture
            overrides.append("training.lora.target_modules=all-linear")
    return overrides


def toys() -> dict[str, dict[str, Any]]:
    """Name → content of the toy experiments: ALT_LMU and its null control."""
    toy: dict[str, Any] = {
        "extends": "pep8_alt_lmu",
        "description": "As small as it gets.",
        "control": "toy_null",
    }
    for override in OVERRIDES:
        toy = merge(toy, nested(*parse_override(override)))
    null = {"extends": "toy", "method": "no_feedback", "control": None, "datapool": {"shares": None}}
    return {"toy": toy, "toy_null": null}


def write_toys(folder: Path) -> Path:
    """The toy experiments as files in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in toys().items():
        (folder / f"{name}.yaml").write_text(write_yaml(content), encoding="utf-8")
    return folder


def environment(home: Path, experiments: Path | None = None) -> dict[str, str]:
    """The environment of a ``textalign`` that keeps everything below ``home``."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TEXTALIGN_", "DAGSTER_"))}
    folders = [str(folder) for folder in (experiments, PROJECT / "experiments") if folder]
    return kept | {
        "TEXTALIGN_HOME": str(home),
        "TEXTALIGN_EXPERIMENTS": os.pathsep.join(folders),
        "PYTHONPATH": str(PROJECT),
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "140",
    }


QUICK = ("-m", "tests.integration.quick")
"""The program for tests that are not about how a training is started (tests/integration/quick.py)."""


def textalign(
    *arguments: str,
    env: Mapping[str, str],
    ok: bool = True,
    text: str | None = None,
    cwd: Path = PROJECT,
    program: tuple[str, ...] = QUICK,
    fork: bool = True,
) -> subprocess.CompletedProcess[str]:
    """``textalign …`` in a forked process (`tests.forked`), by default with its trainings in the same process.

    ``ok``: whether it must succeed; otherwise it must fail with an error message and without a traceback. ``fork``:
    False if libraries read the environment when they are imported.
    """
    done = forked.run(program, arguments, env=env, cwd=cwd, text=text or "", timeout=300, fork=fork)
    output = f"{arguments}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr + done.stdout, output
    if ok:
        assert done.returncode == 0, output
    else:
        assert done.returncode > 0, output
        assert done.stderr.count("rror: ") >= 1, output
    return done
