"""Missing, fresh, stale, blocked: the state of every cell follows from the store and the settings."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from resources.freshness import Freshness
from resources.store import Artifact, ArtifactStore
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.evaluation import evaluation_prompts, evaluation_source
from textalign_dagster.experiment.policies import base_policy
from textalign_dagster.experiment.sources import source_hash, training_prompts
from textalign_dagster.ids import content_hash
from textalign_dagster.loop.stages import STAGES, artifact_key, stage_settings
from textalign_dagster.settings import SettingsError, merge, validate


class Grid:
    """An experiment whose artifacts hold nothing but their keys."""

    def __init__(self, folder: Path) -> None:
        self.store = ArtifactStore(folder / "store")
        self.folder = folder
        for name, prompts in (("train", ["a", "b"]), ("held_out", ["x", "y"])):
            pl.DataFrame({"prompt": prompts}).write_csv(folder / f"{name}.csv")
        self.content = {
            "task": "pep8",
            "method": "quark",
            "policy": {"model": "pep8-sloppy-1m"},
            "prompts": {"path": str(folder / "train.csv"), "per_iteration": 1},
            "evaluation": {"path": str(folder / "held_out.csv"), "prompts": 2},
            "datapool": {"drop_factor": 0.0},
        }

    @property
    def experiment(self) -> Experiment:
        experiment: Experiment = validate(Experiment, self.content, "x")
        return experiment

    def change(self, **changes: object) -> None:
        self.content = merge(self.content, changes)

    @property
    def freshness(self) -> Freshness:
        return Freshness(self.store, "e", self.experiment)

    def artifact(self, k: int, stage: str) -> Artifact:
        pointer = self.store.pointer("e", k, stage)
        assert pointer is not None
        return pointer.artifact

    def policy(self, k: int) -> str:
        if k == 1:
            return base_policy(self.experiment).policy_hash
        return str(self.artifact(k - 1, "checkpoint").manifest["facts"]["policy_hash"])

    def inputs(self, k: int, stage: str) -> dict[str, str]:
        if stage == "prompt_draws":
            return {"source": source_hash(training_prompts(self.experiment))}
        if stage == "generations":
            return {"prompt_draws": self.artifact(k, "prompt_draws").key, "policy": self.policy(k)}
        if stage == "feedback":
            return {"generations": self.artifact(k, "generations").key}
        if stage == "datapool":
            return {
                f"{s}@{i}": self.artifact(i, s).key
                for i in range(1, k + 1)
                for s in ("generations", "feedback")
            }
        if stage == "checkpoint":
            return {"datapool": self.artifact(k, "datapool").key, "policy": self.policy(k)}
        prompts = evaluation_source(evaluation_prompts(self.experiment))
        return {"trained_policy": self.policy(k + 1), "base_policy": self.policy(1), "prompts": prompts}

    def make(self, k: int, stage: str, **checks: bool) -> None:
        settings, inputs = stage_settings(self.experiment, stage, k), self.inputs(k, stage)
        key = artifact_key(stage, {**settings, "iteration": k}, inputs)

        def produce(draft: object) -> None:
            if stage == "checkpoint":
                draft.record(policy_hash=content_hash(key))  # type: ignore[attr-defined]

        artifact = self.store.make(stage, key, produce, inputs=inputs, settings=settings)
        self.store.assign("e", k, stage, artifact, settings=settings, checks=checks)

    def make_all(self, *iterations: int) -> None:
        for k in iterations:
            for stage in STAGES:
                self.make(k, stage)

    def states(self, k: int) -> dict[str, str]:
        return {stage: self.freshness.state(k, stage).kind for stage in STAGES}


@pytest.fixture
def grid(tmp_path: Path) -> Grid:
    grid = Grid(tmp_path)
    grid.make_all(1, 2)
    return grid


def states(*stale: str, kind: str = "stale") -> dict[str, str]:
    return {stage: kind if stage in stale else "fresh" for stage in STAGES}


def test_existing_cells_are_fresh_and_others_are_missing(grid: Grid) -> None:
    assert grid.states(1) == grid.states(2) == states()
    assert grid.freshness.iteration(2).kind == "fresh"
    assert set(grid.states(3).values()) == {"missing"}
    assert grid.freshness.iteration(3).reason == "prompt_draws of e, iteration 3, does not exist"
    assert grid.freshness.policy_hash(1) == base_policy(grid.experiment).policy_hash
    assert grid.freshness.policy_hash(3) == grid.policy(3)
    assert grid.freshness.policy_hash(4) is None


@pytest.mark.parametrize(
    ("changes", "first", "second"),
    [
        ({"training": {"learning_rate": 0.5}}, STAGES[4:], STAGES[1:]),
        ({"datapool": {"samples": 9}}, STAGES[3:], STAGES[1:]),
        ({"sampling": {"temperature": 0.5}}, STAGES[1:], STAGES[1:]),
        ({"prompts": {"per_iteration": 2}}, STAGES, STAGES),
        ({"evaluation": {"resamples": 200}}, STAGES[5:], STAGES[5:]),
        (
            {
                "description": "x",
                "iterations": 9,
                "checks": {"max_empty": 0.9},
                "sampling": {"batch_size": 1},
            },
            (),
            (),
        ),
    ],
)
def test_changed_settings_make_later_stages_stale(
    grid: Grid, changes: dict[str, object], first: tuple[str, ...], second: tuple[str, ...]
) -> None:
    grid.change(**changes)
    assert grid.states(1) == states(*first)
    assert grid.states(2) == states(*second)


def test_the_reason_names_the_original_change(grid: Grid) -> None:
    grid.change(training={"learning_rate": 0.5})
    reason = "checkpoint of e, iteration 1, was computed with different settings (training.learning_rate: 2e-05 -> 0.5)"
    assert grid.freshness.state(2, "evaluation").reason == reason
    assert grid.freshness.iteration(2).reason == reason


def test_a_recomputed_checkpoint_makes_the_next_iteration_stale(grid: Grid) -> None:
    grid.change(training={"learning_rate": 0.5})
    grid.make(1, "checkpoint")
    grid.make(1, "evaluation")
    assert grid.states(1) == states()
    assert grid.states(2) == states(*STAGES[1:])
    assert grid.freshness.state(2, "generations").reason == (
        "generations of e, iteration 2, was computed from a policy replaced since then"
    )
    grid.make_all(2)
    assert grid.states(2) == states()


def test_recomputed_feedback_makes_later_pools_stale(grid: Grid) -> None:
    grid.change(task={"name": "pep8", "max_prompts": 5})  # the scorer depends on the task's settings, too
    grid.make(1, "prompt_draws")
    grid.make(1, "generations")
    grid.make(1, "feedback")
    reason = grid.freshness.state(2, "datapool").reason
    assert "replaced since then" in reason or "with other settings" in reason
    assert grid.states(1) == states("datapool", "checkpoint", "evaluation")


@pytest.mark.parametrize(("name", "first"), [("train", STAGES), ("held_out", STAGES[5:])])
def test_an_edited_prompt_file_is_detected(grid: Grid, name: str, first: tuple[str, ...]) -> None:
    pl.DataFrame({"prompt": ["c", "d", "e"]}).write_csv(grid.folder / f"{name}.csv")
    assert grid.states(1) == states(*first)
    reason = grid.freshness.iteration(1).reason
    source = {"train": "prompts", "held_out": "held-out prompts"}[name]
    assert reason.endswith(f"was computed from {source} replaced since then") or source in reason


def test_moving_the_prompt_file_changes_nothing(grid: Grid) -> None:
    (grid.folder / "train.csv").rename(grid.folder / "moved.csv")
    with pytest.raises(SettingsError, match="no such prompt file"):
        grid.freshness.state(1, "prompt_draws")
    (grid.folder / "elsewhere").mkdir()
    (grid.folder / "moved.csv").rename(grid.folder / "elsewhere" / "train.csv")
    grid.change(prompts={"path": str(grid.folder / "elsewhere" / "train.csv")})
    assert grid.states(1) == states()


def test_a_different_base_policy_makes_all_samples_stale(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        policy_hash = "other"

    monkeypatch.setattr("resources.freshness.base_policy", lambda experiment: Other)
    assert grid.states(1) == states(*STAGES[1:])


def test_a_failed_check_blocks_later_stages(grid: Grid) -> None:
    grid.make(1, "feedback", usable=False, schema=True)
    assert grid.states(1) == states(*STAGES[2:], kind="blocked")
    assert (
        grid.freshness.state(1, "checkpoint").reason == "feedback of e, iteration 1, failed its check usable"
    )
    assert grid.states(2)["generations"] == "blocked"
    grid.make(1, "feedback", usable=True)
    assert grid.states(1) == grid.states(2) == states()


def test_stale_takes_precedence_over_blocked(grid: Grid) -> None:
    grid.make(1, "checkpoint", converged=False)
    grid.change(training={"learning_rate": 0.5})
    assert grid.freshness.state(1, "checkpoint").kind == "stale"


def test_states_are_a_snapshot_taken_at_creation(grid: Grid) -> None:
    before = grid.freshness
    assert before.state(1, "feedback").kind == "fresh"
    grid.make(1, "feedback", usable=False)
    assert before.state(1, "feedback").kind == "fresh"
    assert grid.freshness.state(1, "feedback").kind == "blocked"


def test_a_pool_without_history_depends_only_on_its_own_iteration(tmp_path: Path) -> None:
    grid = Grid(tmp_path)
    own_inputs: Callable[[int], dict[str, str]] = lambda k: {  # noqa: E731
        f"{s}@{k}": grid.artifact(k, s).key for s in ("generations", "feedback")
    }
    all_inputs = grid.inputs
    grid.inputs = lambda k, stage: own_inputs(k) if stage == "datapool" else all_inputs(k, stage)  # type: ignore[method-assign]
    grid.make_all(1, 2)
    grid.make(1, "feedback", usable=False)
    assert grid.freshness.state(2, "datapool").kind == "blocked"  # through the policy, not the pool
    grid.make(1, "feedback")
    assert grid.states(2) == states()
