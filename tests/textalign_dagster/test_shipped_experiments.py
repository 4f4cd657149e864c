"""The shipped experiments as files: each loads, and stands beside a null control."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.toy import PROJECT, ToyModels, shipped_overrides
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.files import TEMPLATES, Library
from textalign_dagster.methods import ForwardPrediction

LIBRARY = Library((PROJECT / "experiments", TEMPLATES))


def is_controlled(experiment: Experiment, control: str | None) -> bool:
    """Whether it has a control exactly if it trains a policy on feedback: a reward model is none. A judge may have one."""
    if isinstance(experiment.method, ForwardPrediction):
        return True
    return (control is not None) == (
        experiment.method.wants is not None and experiment.method.trains == "policy"
    )


@pytest.mark.parametrize("name", LIBRARY.paths)
def test_it_names_a_control_that_controls_it(name: str) -> None:
    experiment, control = LIBRARY.load(name), LIBRARY.control_of(name)
    assert experiment.description
    assert is_controlled(experiment, control)
    if control is not None:
        # Both train on as many rows, as far as the settings tell.
        kept, same = (LIBRARY.load(n) for n in (name, control))
        rows = [
            (e.prompts.per_iteration or 0) * e.sampling.samples_per_prompt
            if e.datapool.draws_all
            else e.datapool.samples or (e.datapool.samples_per_bucket or 0) * len(e.method.buckets)
            for e in (kept, same)
        ]
        assert rows[0] == rows[1]


@pytest.mark.parametrize("name", LIBRARY.paths)
def test_it_can_be_made_tiny_and_its_control_with_it(name: str, tmp_path: Path) -> None:
    models = ToyModels(*(tmp_path / kind for kind in ("policy", "classifier", "reward_model", "corpus")))
    overrides = shipped_overrides(LIBRARY.load(name), models, "http://localhost:1/v1")
    variant = LIBRARY.variant(name, overrides, tmp_path / "variants")
    both = Library((PROJECT / "experiments", tmp_path / "variants"))
    tiny, control = both.load(variant), both.control_of(variant)
    assert is_controlled(tiny, control)
    data = getattr(tiny.task, "data", None)
    assert data is None or data.hub is None
    assert tiny.prompts.per_iteration == 4
