"""The shipped experiment files: each loads and has a null control where it needs one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.toy import PROJECT, ToyModels, shipped_overrides
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.files import TEMPLATES, Library
from textalign_dagster.methods import ForwardPrediction

LIBRARY = Library((PROJECT / "experiments", TEMPLATES))


def is_controlled(experiment: Experiment, control: str | None) -> bool:
    """Whether there is a control if and only if a policy is trained on feedback; always true for a judge, which may have one."""
    if isinstance(experiment.method, ForwardPrediction):
        return True
    return (control is not None) == (
        experiment.method.wants is not None and experiment.method.trains == "policy"
    )


@pytest.mark.parametrize("name", LIBRARY.paths)
def test_experiment_has_a_matching_control(name: str) -> None:
    experiment, control = LIBRARY.load(name), LIBRARY.control_of(name)
    assert experiment.description
    assert is_controlled(experiment, control)
    if control is not None:
        # Both train on the same number of rows, as far as the settings show.
        treatment, baseline = (LIBRARY.load(n) for n in (name, control))
        rows = [
            (e.prompts.per_iteration or 0) * e.sampling.samples_per_prompt
            if e.datapool.draws_all
            else e.datapool.samples or (e.datapool.samples_per_bucket or 0) * len(e.method.buckets)
            for e in (treatment, baseline)
        ]
        assert rows[0] == rows[1]


@pytest.mark.parametrize("name", LIBRARY.paths)
def test_experiment_and_control_can_be_scaled_down(name: str, tmp_path: Path) -> None:
    models = ToyModels(*(tmp_path / kind for kind in ("policy", "classifier", "reward_model", "corpus")))
    overrides = shipped_overrides(LIBRARY.load(name), models, "http://localhost:1/v1")
    variant = LIBRARY.variant(name, overrides, tmp_path / "variants")
    both = Library((PROJECT / "experiments", tmp_path / "variants"))
    tiny, control = both.load(variant), both.control_of(variant)
    assert is_controlled(tiny, control)
    data = getattr(tiny.task, "data", None)
    assert data is None or data.hub is None
    assert tiny.prompts.per_iteration == 4
