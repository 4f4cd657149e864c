"""Every shipped experiment runs, at toy size and without hub, GPU or LLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE
from typing import IO

import pytest

from tests import forked
from tests.integration.conftest import Place, new_place
from tests.toy import PROJECT, ToyModels, shipped_overrides
from textalign_dagster.experiment.files import TEMPLATES, Library
from textalign_dagster.reports.score_table import reported
from textalign_dagster.reports.status import grid
from textalign_dagster.settings import read_yaml

SHIPPED = Library((PROJECT / "experiments", TEMPLATES))


class Zoo:
    """Where all of them run, one beside the other and in one process: what they have in common is made once."""

    def __init__(self, place: Place, models: ToyModels, judge_url: str, log: IO[str]) -> None:
        self.place, self.log = place, log
        self.variants: dict[str, str] = {}
        # A model that another experiment trains is that of its toy variant.
        for name in sorted(SHIPPED.paths, key=lambda name: trained_by(name) is not None):
            overrides = [
                *shipped_overrides(SHIPPED.load(name), models, judge_url),
                f"iterations={iterations(name)}",
            ]
            source = trained_by(name)
            if source is not None:
                overrides.append(f"scorer.model={self.variants[source[0]]}@{source[1]}")
            self.variants[name] = SHIPPED.variant(name, overrides, place.home / "variants")
        self.library = Library((PROJECT / "experiments", place.home / "variants"))
        # The process imports the experiments once, so all variants are written before.
        command = ["python", "-m", "tests.integration.zoo"]
        self.process = forked.Popen(command, env=place.env, stdin=PIPE, stdout=PIPE, stderr=log)

    def run(self, name: str) -> str:
        """Runs a shipped experiment at toy size; the name of its variant."""
        source = trained_by(name)
        if source is not None:
            self.run(source[0])
        print(self.variants[name], file=self.process.stdin, flush=True)
        problem = self.process.stdout.readline()
        assert problem == "\n", problem or Path(self.log.name).read_text()[-5000:]
        return self.variants[name]

    def close(self) -> None:
        self.process.stdin.close()
        assert self.process.wait(60) == 0


def trained_by(name: str) -> tuple[str, int] | None:
    """The experiment and iteration whose model judges the samples of another one."""
    scorer = SHIPPED.load(name).scorer
    return None if scorer is None else scorer.trained


def iterations(name: str) -> int:
    """How many are run: what a method asks for shows in iteration 2, and so does a reference that is not the base
    policy; seen for each of them with pep8, and once a task."""
    experiment = SHIPPED.load(name)
    asks = experiment.offline is None and (
        experiment.method.exemplar is not None or experiment.training.objective.reference_policy == "parent"
    )
    first_of_its_task = "extends" not in read_yaml(SHIPPED.path(name))
    return 2 if (asks and experiment.task.name == "pep8") or first_of_its_task else 1


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory, toy_models: ToyModels, judge_url: str) -> Iterator[Zoo]:
    folder = tmp_path_factory.mktemp("zoo")
    with (folder / "log").open("w") as log:
        zoo = Zoo(new_place(folder / "place"), toy_models, judge_url, log)
        yield zoo
        zoo.close()


@pytest.fixture(scope="module")
def first_samples() -> dict[str, str]:
    """Task and seed → key of the samples of iteration 1, as the first of its experiments had them."""
    return {}


@pytest.mark.parametrize("name", SHIPPED.paths)
def test_it_runs(zoo: Zoo, name: str, first_samples: dict[str, str]) -> None:
    variant, last, place, library = zoo.run(name), iterations(name), zoo.place, zoo.library
    experiment = library.load(variant)
    assert {cell["state"] for cell in grid(place.store, library, [variant])} == {"fresh"}

    asked = {None} if last == 1 or experiment.offline is not None else {experiment.method.exemplar}
    assert set(place.frame(variant, last, "generations")["condition"]) == asked
    drawn = place.frame(variant, last, "datapool").filter("drawn")
    assert drawn.height and set(drawn["label"]) <= set(experiment.method.buckets)
    # What the task exists to improve was measured, at the start and in the end.
    first = reported(experiment)[0].name
    for k in (0, last):
        scores = place.frame(variant, k, "evaluation", "scores").filter(role="main")
        assert first in scores["metric"].to_list(), scores
    # Iteration 1 knows no method yet, so a task's experiments share its samples.
    key, source = (
        place.artifact(variant, 1, "generations").key,
        f"{experiment.task.name}, seed {experiment.seed}",
    )
    if experiment.offline is not None:
        source += f", {experiment.offline.path}, {experiment.offline.reading}"
    assert first_samples.setdefault(source, key) == key
