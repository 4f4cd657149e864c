"""An experiment: impossible settings are rejected, omitted ones have defaults."""

from __future__ import annotations

from typing import Any

import pytest

from textalign_dagster.experiment import Experiment
from textalign_dagster.settings import SettingsError, describe, merge, parse_yaml, validate

MINIMAL: dict[str, Any] = {"task": "pep8", "method": "quark", "policy": {"model": "m"}}


def experiment(**changes: Any) -> Experiment:
    result: Experiment = validate(Experiment, merge(MINIMAL, changes), "x.yaml")
    return result


def test_three_fields_are_enough() -> None:
    minimal = experiment()
    assert (minimal.iterations, minimal.seed, minimal.control) == (3, 0, None)
    assert minimal.method.name == "quark"
    assert minimal.datapool.drop_factor == 1.0
    assert minimal.evaluation.probe


def test_short_form_of_task_and_method() -> None:
    assert experiment(method="quark") == experiment(method={"name": "quark"}, task={"name": "pep8"})


def test_settings_are_immutable() -> None:
    with pytest.raises(Exception, match="frozen"):
        experiment().seed = 1  # type: ignore[misc]


def test_description_of_every_method_is_a_valid_experiment() -> None:
    for method in ("quark", "alt_rm", "no_feedback", {"name": "alt_lmu", "ask_for": "a: b # c"}):
        found = experiment(method=method, datapool={"samples": 4, "fill": "none"})
        description = describe(found)
        assert validate(Experiment, parse_yaml(description, "described"), "described") == found
        assert all(line.lstrip().startswith("#") or ":" in line for line in description.splitlines() if line)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "quar"}, "method: unknown name 'quar' (did you mean 'quark'?); one of: "),
        ({"task": "pep9"}, "'pep9'"),
        ({"method": {"name": "alt_lmu"}}, "method.ask_for: missing"),
        ({"datapool": {"samples": 4, "shares": {"a": 1.0}}}, "datapool.shares: a is not a bucket of method quark"),
        ({"datapool": {"shares": {"a": 1.0}}}, "datapool: shares weighs the labels of samples"),
        ({"datapool": {"samples": 1, "samples_per_bucket": 1}}, "datapool: samples and samples_per_bucket are mutually"),
        ({"sampling": {"min_new_tokens": 9, "max_new_tokens": 8}}, "sampling: min_new_tokens is larger"),
        ({"prompts": {"draw": "weighted"}}, "prompts: `weights` and `draw: weighted` belong together"),
        ({"prompts": {"weights": "select 1"}}, "prompts: `weights` and `draw: weighted` belong together"),
        ({"method": {"name": "alt_lmu", "ask_for": "a", "probe": ["a"]}}, "method: `probe` repeats `ask_for`"),
        ({"method": {"name": "alt_lmu", "ask_for": "a", "scores": [1, 1]}}, "listed twice"),
        ({"method": {"name": "alt_rm", "phrases": ["a", "a"]}}, "method.phrases: two quantiles have the same phrase"),
        ({"method": {"count": 3}}, "method.name: missing; one of: "),
        ({"method": 3}, "method: 3 given, but it should be a section of fields"),
        ({"method": {"name": "quark", "template": "{prompt}"}}, "method.template: template"),
        ({"method": {"name": "quark", "template": "{condition}{condition}{prompt}"}}, "method.template: template"),
        ({"training": {"betas": [0.9]}}, "training.betas"),
        ({"training": {"betas": [0.9, 1.5]}}, "training.betas.1: 1.5 given, but it should be less than 1"),
        ({"training": {"warmup_ratio": 1.0}}, "training.warmup_ratio: 1.0 given, but it should be less than 1"),
        ({"iterations": 1000}, "iterations: 1000 given"),
        ({"iterations": 0}, "iterations: 0 given"),
        ({"evaluation": {"prompts": 1}}, "evaluation.prompts: 1 given"),
    ],
)  # fmt: skip
def test_impossible_settings_are_rejected(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError) as caught:
        experiment(**changes)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_null_control_shares_everything_before_training() -> None:
    plain = experiment()
    assert plain.upstream == experiment(method="no_feedback", training={"epochs": 9.0}, iterations=1).upstream
    for changes in ({"seed": 1}, {"sampling": {"temperature": 0.5}}, {"prompts": {"per_iteration": 1}},
                    {"policy": {"dtype": "bfloat16"}}, {"evaluation": {"prompts": 2}},
                    {"task": {"name": "pep8", "max_prompts": 5}}):  # fmt: skip
        assert plain.upstream != experiment(**changes).upstream
