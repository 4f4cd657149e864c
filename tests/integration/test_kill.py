"""kill -9 at any moment: nothing half-made shows, nobody is left, and the same command goes on."""

from __future__ import annotations

import json
import time
import uuid
from pathlib import Path

import pytest
import yaml

from tests import forked
from tests.integration.conftest import Place, Ran, new_place
from tests.toy import PROJECT
from textalign_dagster.cli.running import dagster_instance
from textalign_dagster.loop.stages import STAGES

KILLER = str(Path(__file__).with_name("killed_at.py"))

# moment → the stages that are there afterwards. One after the other, in one place: each run goes on
# from where the one before was killed.
MOMENTS = {
    "Ctrl-C while generating": STAGES[:1],
    "generating": STAGES[:1],
    "before the datapool's manifest": STAGES[:3],
    "training": STAGES[:4],
    "before the checkpoint's pointer": STAGES[:4],
}


def started_by(mark: str) -> list[str]:
    """The processes that carry a mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes():
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:  # gone meanwhile, or somebody else's
            continue
    return found


def wait_until_all_are_gone(mark: str, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while left := started_by(mark):
        assert time.monotonic() < deadline, f"still alive: {left}"
        time.sleep(0.05)


def made(place: Place) -> list[str]:
    """The stages of iteration 1 that anybody can see."""
    found = place.store.cells()
    assert set(found["iteration"]) <= {1}
    return [stage for stage in STAGES if stage in set(found["stage"])]


def runs(place: Place) -> list[str]:
    """The states of Dagster's runs, oldest first."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEXTALIGN_HOME", str(place.home))
        patch.delenv("DAGSTER_HOME", raising=False)
        with dagster_instance() as instance:
            return [run.status.value for run in reversed(instance.get_runs())]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Place, dict[str, list[str]]]:
    """A place where the run was killed at every moment in turn, and what was to be seen after each."""
    place = new_place(tmp_path_factory.mktemp("killed") / "place")
    experiment = place.folder / "experiments" / "toy.yaml"
    content = yaml.safe_load(experiment.read_text())
    content.setdefault("training", {})["snapshot_minutes"] = 1e-9  # after every step; it changes no key
    experiment.write_text(yaml.safe_dump(content))
    seen = {}
    for moment in MOMENTS:
        mark = f"TEXTALIGN_TEST={uuid.uuid4().hex}"
        name, _, value = mark.partition("=")
        arguments = [moment, "run", "toy", "--iterations", "1", "--no-control"]
        # The variable reaches the trainer and the workers, which are started as for users.
        env = {**place.env, name: value}
        done = forked.run([KILLER], arguments, env=env, cwd=PROJECT, text="", timeout=120)
        if moment.startswith("Ctrl-C"):
            assert done.returncode == 130, f"{moment}: {done.stdout}{done.stderr}"
            assert done.stderr == "stopped; finished stages are kept, the same command resumes from there\n"
        else:
            assert done.returncode == -9, f"{moment}: {done.stdout}{done.stderr}"
        # The trainer, the sampler's worker and whatever they started end by themselves.
        wait_until_all_are_gone(mark)
        seen[moment] = made(place)
        assert place.textalign("status", "toy").returncode == 0
        place.textalign("sql", "select count(*) from samples")
    return place, seen


@pytest.mark.parametrize("moment", MOMENTS)
def test_only_what_was_published_is_seen(killed: tuple[Place, dict[str, list[str]]], moment: str) -> None:
    assert killed[1][moment] == list(MOMENTS[moment])


def test_the_same_command_goes_on_to_the_same_tables(
    killed: tuple[Place, dict[str, list[str]]], ran: Ran
) -> None:
    place, _ = killed
    trained = place.home / "store" / "artifacts" / "checkpoint"
    assert len(list(trained.glob("*/manifest.json"))) == 1  # published, though no cell points at it

    output = place.textalign("run", "toy", "--iterations", "1", "--no-control").stdout
    for stage in MOMENTS["training"]:
        assert f"{stage:<13}   reused" in output
    assert "checkpoint      reused" in output  # what was paid for is not paid for again

    for stage in STAGES:
        mine, theirs = place.artifact("toy", 1, stage), ran.artifact("toy", 1, stage)
        assert mine.key == theirs.key
        assert set(mine.tables) == set(theirs.tables)
        for table in mine.tables:
            if table != "checkpoints":  # it tells the seconds it took
                assert mine.tables[table]["sha256"] == theirs.tables[table]["sha256"], f"{stage}: {table}"
        mine.verify()
    mine, theirs = (p.frame("toy", 1, "checkpoint", "checkpoints") for p in (place, ran))
    apart = ("seconds", "config")  # in which snapshot_minutes stands, too
    assert mine.drop(apart).equals(theirs.drop(apart))  # the policy's hash among them
    # The training that was killed was gone on with, to the same weights; its snapshots are gone.
    (step,) = place.artifact("toy", 1, "checkpoint").manifest["facts"]["resumed_at"]
    assert step == mine["steps"].item() - 1
    assert list((place.home / "unfinished").iterdir()) == []

    # Nothing is left of the attempts that were killed.
    artifacts = place.home / "store" / "artifacts"
    published = {json.loads(p.read_text())["attempt"] for p in artifacts.glob("*/*/manifest.json")}
    assert {p.name for p in artifacts.glob("*/*/*") if p.is_dir()} == published

    # Dagster's own record: each killed run was marked as failed by the next one.
    assert runs(place) == ["FAILURE"] * len(MOMENTS) + ["SUCCESS"]
