"""Which setting affects which stage: what is recomputed after an edit, and what is shared."""

from __future__ import annotations

import json

import pytest

from textalign_dagster import PROJECT
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.files import Library
from textalign_dagster.loop.stages import STAGES, VERSIONS, artifact_key, stage_settings

LIBRARY = Library((PROJECT / "experiments",))
FIRST, LATER = "first iteration", "later iterations"


def changed(before: Experiment, after: Experiment, iteration: int) -> list[str]:
    """The stages whose own settings differ (stages downstream of them differ by their inputs)."""
    return [s for s in STAGES if stage_settings(before, s, iteration) != stage_settings(after, s, iteration)]


AFFECTED = {
    # override → (stages of iteration 1, stages of later ones)
    "training.learning_rate=3.21e-5": (["checkpoint"], ["checkpoint"]),
    "training.density_ratio={}": (["checkpoint"], ["checkpoint"]),
    "evaluation.kl_reference=base": (["evaluation"], ["evaluation"]),
    "evaluation.scenarios={unprompted: {}}": (["evaluation"], ["evaluation"]),
    "evaluation.rouge=true": (["evaluation"], ["evaluation"]),
    "evaluation.lm_eval={tasks: [hellaswag]}": (["evaluation"], ["evaluation"]),
    "evaluation.red_team={path: attacks.jsonl}": (["evaluation"], ["evaluation"]),
    "training.batch_size=3": (["checkpoint"], ["checkpoint"]),
    "training.start_from=base": (["checkpoint"], ["checkpoint"]),
    "training.objective.kl_coef=0.3": (["checkpoint"], ["checkpoint"]),
    "datapool.samples=100": (["datapool"], ["datapool"]),
    "datapool.drop_factor=1.0": (["datapool"], ["datapool"]),
    "datapool.weights=select 1": (["datapool"], ["datapool"]),
    "evaluation.text_statistics=true": (["evaluation"], ["evaluation"]),
    "prompts.per_iteration=7": (["prompt_draws"], ["prompt_draws"]),
    "prompts.draw=with_replacement": (["prompt_draws"], ["prompt_draws"]),
    "prompts.path=here.jsonl": ([], []),  # its content matters, as an input
    "offline.path=here.jsonl": (["generations", "feedback", "datapool"], ["generations", "feedback", "datapool"]),
    "sampling.samples_per_prompt=4": (["generations"], ["generations"]),
    "sampling.temperature=0.7": (["generations"], ["generations"]),
    "sampling.max_new_tokens=20": (["generations", "datapool", "evaluation"],) * 2,
    "sampling.ignore_eos=false": (["generations", "evaluation"],) * 2,
    "sampling.batch_size=7": ([], []),  # changes speed only
    "evaluation.temperature=0.1": (["evaluation"], ["evaluation"]),
    "evaluation.prompts=50": (["evaluation"], ["evaluation"]),
    "evaluation.resamples=500": (["evaluation"], ["evaluation"]),
    "evaluation.probe=false": (["evaluation"], ["evaluation"]),
    "evaluation.path=there.csv": ([], []),
    "evaluation.max_new_tokens=20": (["evaluation"], ["evaluation"]),
    "evaluation.scorer={name: pii}": (["evaluation"], ["evaluation"]),
    "evaluation.judge={model: m, template: text_feedback}": (["evaluation"], ["evaluation"]),
    "evaluation.fluency_model=pep8-sloppy-1m": (["evaluation"], ["evaluation"]),
    "evaluation.baselines={start: pep8-sloppy-1m}": (["evaluation"], []),  # evaluated with iteration 0
    "method.probe=[other]": (["datapool", "evaluation"],) * 2,
    "method.ask_for=tidy": (["datapool", "evaluation"], ["generations", "datapool", "evaluation"]),
    "method.template='{condition}: {prompt}'": (
        ["datapool", "checkpoint", "evaluation"], ["generations", "datapool", "checkpoint", "evaluation"]
    ),
    "task.max_prompts=50": (["prompt_draws", "feedback", "evaluation"],) * 2,
    "policy.dtype=bfloat16": (["generations", "checkpoint", "evaluation"],) * 2,
    "policy.model=elsewhere": ([], []),  # its content matters, as an input
    "seed=1": (["prompt_draws", "datapool", "checkpoint", "evaluation"],) * 2,
    "description=other": ([], []),
    "iterations=9": ([], []),
    "control=null": ([], []),
    "judge={model: m, template: text_feedback}": (["feedback"], ["feedback"]),
    "scorer={name: imported, path: 'a_{iteration}.csv', format: plain, kind: text}": (["feedback"],) * 2,
    "checks.max_empty=0.5": ([], []),  # a limit is not an input: the check is evaluated again
}  # fmt: skip


@pytest.mark.parametrize("override", AFFECTED)
def test_override_changes_the_expected_stages(override: str) -> None:
    before, after = LIBRARY.load("pep8_alt_lmu"), LIBRARY.overridden("pep8_alt_lmu", [override])
    assert before != after, "the override changes nothing: choose another value"
    first, later = AFFECTED[override]
    assert changed(before, after, 1) == first
    assert changed(before, after, 2) == changed(before, after, 3) == later


def test_judge_limits_and_api_key_change_no_stage() -> None:
    judge = "judge={model: m, template: text_feedback}"
    before = LIBRARY.overridden("pep8_alt_lmu", [judge])
    for override in ("judge.limits.concurrency=3", "judge.api_key_env=MY_KEY"):
        assert changed(before, LIBRARY.overridden("pep8_alt_lmu", [judge, override]), 2) == []
    others = ("judge.group=2", "judge.repeats=2", "judge.scale={low: 0, high: 9}")
    for override in ("judge.model=n", "judge.decoding.temperature=0.3", "judge.structured=off", *others):
        assert changed(before, LIBRARY.overridden("pep8_alt_lmu", [judge, override]), 2) == ["feedback"]


def test_which_evaluation_settings_matter() -> None:
    """A baseline's name matters, as does a separate length limit, which takes precedence over that of the samples."""
    before = LIBRARY.overridden("pep8_alt_lmu", ["evaluation.baselines={start: pep8-sloppy-1m}"])
    renamed = LIBRARY.overridden("pep8_alt_lmu", ["evaluation.baselines={other: pep8-sloppy-1m}"])
    assert changed(before, renamed, 0) == changed(before, renamed, 1) == ["evaluation"]
    length = "evaluation.max_new_tokens=30"
    before = LIBRARY.overridden("pep8_alt_lmu", [length])
    after = LIBRARY.overridden("pep8_alt_lmu", [length, "sampling.max_new_tokens=20"])
    assert "evaluation" not in changed(before, after, 1)
    judged = "evaluation.judge={model: m, template: text_feedback}"
    before = LIBRARY.overridden("pep8_alt_lmu", [judged])
    after = LIBRARY.overridden("pep8_alt_lmu", [judged, "evaluation.judge.limits.concurrency=3"])
    assert changed(before, after, 1) == []


def test_every_section_of_an_experiment_is_in_the_table() -> None:
    """A new section must be added to the table."""
    sections = {override.partition("=")[0].partition(".")[0] for override in AFFECTED}
    assert sections == set(Experiment.model_fields)


@pytest.mark.parametrize("name", ["pep8_alt_lmu", "pep8_alt_rm", "pep8_quark"])
def test_the_null_control_shares_samples_and_the_base_evaluation(name: str) -> None:
    method, control = LIBRARY.load(name), LIBRARY.load("pep8_no_feedback")
    assert "prompt_draws" not in changed(method, control, 1) + changed(method, control, 2)
    assert "generations" not in changed(method, control, 1)
    assert "generations" in changed(method, control, 2)  # it requests no condition
    assert "datapool" in changed(method, control, 1)
    assert stage_settings(method, "evaluation", 0) == stage_settings(control, "evaluation", 0)
    assert stage_settings(method, "evaluation", 1) != stage_settings(control, "evaluation", 1)


def test_siblings_share_the_base_evaluation() -> None:
    names = ["pep8_alt_lmu", "pep8_alt_rm", "pep8_quark", "pep8_no_feedback"]
    settings = [stage_settings(LIBRARY.load(name), "evaluation", 0) for name in names]
    assert all(other == settings[0] for other in settings)


@pytest.mark.parametrize("stage", STAGES)
def test_stage_settings_survive_a_json_round_trip(stage: str) -> None:
    for iteration in (0, 1, 2):
        settings = stage_settings(LIBRARY.load("pep8_alt_rm"), stage, iteration)
        assert json.loads(json.dumps(settings)) == settings


def test_artifact_key_depends_on_stage_settings_inputs_and_version(monkeypatch: pytest.MonkeyPatch) -> None:
    key = artifact_key("feedback", {"a": 1}, {"x": "1"})
    assert key == artifact_key("feedback", {"a": 1}, {"x": "1"})
    others = [
        artifact_key("datapool", {"a": 1}, {"x": "1"}),
        artifact_key("feedback", {"a": 2}, {"x": "1"}),
        artifact_key("feedback", {"a": 1}, {"x": "2"}),
        artifact_key("feedback", {"a": 1}, {"y": "1"}),
        artifact_key("feedback", {}, {"a": "1", "x": "1"}),
    ]
    assert len({key, *others}) == 6
    monkeypatch.setitem(VERSIONS, "feedback", VERSIONS["feedback"] + 1)
    assert artifact_key("feedback", {"a": 1}, {"x": "1"}) != key


def test_unknown_stage_is_rejected() -> None:
    with pytest.raises(ValueError, match="unknown stage 'x'; one of prompt_draws, "):
        stage_settings(LIBRARY.load("pep8_quark"), "x", 1)
    assert set(VERSIONS) == set(STAGES)


def test_samples_of_swapped_weights_are_marked_by_engine() -> None:
    """vLLM's CPU build sampled from wrong weights once they were swapped: such samples count as stale."""
    plain = LIBRARY.load("pep8_alt_lmu")
    vllm = LIBRARY.overridden("pep8_alt_lmu", ["sampling.engine=vllm"])
    marked = {"swapped_weights": 2}
    for stage, iteration, expected in (
        ("generations", 1, {}),  # the first weights of an engine
        ("generations", 2, marked),
        ("evaluation", 0, {}),
        ("evaluation", 1, marked),
    ):
        settings = stage_settings(vllm, stage, iteration)
        assert {k: v for k, v in settings.items() if k == "swapped_weights"} == expected, stage
        assert "swapped_weights" not in stage_settings(plain, stage, iteration)
