"""Every shipped experiment runs through the command line, at toy size and without hub, GPU or LLM."""

from __future__ import annotations

import re

import pytest

from tests.integration.conftest import Place, new_place
from tests.toy import PROJECT, ToyModels, shipped_overrides
from textalign_dagster.experiment.files import TEMPLATES, Library
from textalign_dagster.reports.score_table import reported
from textalign_dagster.reports.status import grid
from textalign_dagster.scorers import JudgeModel
from textalign_dagster.settings import read_yaml

SHIPPED = Library((PROJECT / "experiments", TEMPLATES))


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Where they run, one beside the other: what they have in common is made once."""
    return new_place(tmp_path_factory.mktemp("zoo") / "place")


@pytest.fixture(scope="module")
def first_samples() -> dict[str, str]:
    """Task → key of the samples of iteration 1, as the first of its experiments had them."""
    return {}


@pytest.mark.parametrize("name", SHIPPED.paths)
def test_it_runs(
    zoo: Place, name: str, toy_models: ToyModels, judge_url: str, first_samples: dict[str, str]
) -> None:
    experiment = SHIPPED.load(name)
    # What a method asks for shows in iteration 2, and so does a reference that is not the base policy: seen for
    # each of them with pep8, and once a task.
    asks = experiment.offline is None and (
        experiment.method.exemplar is not None or experiment.training.objective.reference_policy == "parent"
    )
    last = (
        2
        if (asks and experiment.task.name == "pep8") or "extends" not in read_yaml(SHIPPED.path(name))
        else 1
    )
    overrides = [*shipped_overrides(experiment, toy_models, judge_url), f"iterations={last}"]
    trained = None if experiment.scorer is None else experiment.scorer.trained
    if trained is not None:  # the model that another experiment trains, of toy size, too
        source, iteration = trained
        other = SHIPPED.load(source)
        small = [*shipped_overrides(other, toy_models, judge_url), "iterations=1"]
        if isinstance(experiment.scorer, JudgeModel):  # it must learn to say something and to stop
            small.append("training.epochs=20")
        zoo.textalign("run", source, "--no-control", *(p for o in small for p in ("--set", o)))
        variant = SHIPPED.variant(source, small, zoo.home / "variants")
        overrides.append(f"scorer.model={variant}@{iteration}")
    done = zoo.textalign("run", name, "--no-control", *(part for o in overrides for part in ("--set", o)))
    found = re.findall(rf"^({re.escape(name)}\+\S*)\|{last:03d} +evaluation", done.stdout, re.MULTILINE)
    assert len(found) == 1, done.stdout
    (variant,) = found
    library = Library((PROJECT / "experiments", zoo.home / "variants"))
    experiment = library.load(variant)
    assert {cell["state"] for cell in grid(zoo.store, library, [variant])} == {"fresh"}

    asked = {None} if last == 1 or experiment.offline is not None else {experiment.method.exemplar}
    assert set(zoo.frame(variant, last, "generations")["condition"]) == asked
    drawn = zoo.frame(variant, last, "datapool").filter("drawn")
    assert drawn.height and set(drawn["label"]) <= set(experiment.method.buckets)
    # What the task exists to improve was measured, at the start and in the end.
    first = reported(experiment)[0].name
    for k in (0, last):
        scores = zoo.frame(variant, k, "evaluation", "scores").filter(role="main")
        assert first in scores["metric"].to_list(), scores
    # Iteration 1 knows no method yet, so a task's experiments share its samples.
    key, source = zoo.artifact(variant, 1, "generations").key, experiment.task.name
    if experiment.offline is not None:
        source += f", {experiment.offline.path}, {experiment.offline.reading}"
    assert first_samples.setdefault(source, key) == key
