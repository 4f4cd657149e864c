"""The state of each cell of the grid: missing, fresh, stale or blocked by a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from resources.rewards import trained
from resources.store import ArtifactStore
from resources.store.cells import Pointer
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.evaluation import evaluation_prompts, evaluation_source, further_prompts
from textalign_dagster.experiment.policies import base_policy
from textalign_dagster.experiment.sources import source_hash, training_prompts
from textalign_dagster.ids import settings_diff
from textalign_dagster.loop.stages import STAGES, stage_settings

CALLED = {
    "source": "prompts",
    "prompts": "held-out prompts",
    "policy": "a policy",
    "trained_policy": "a checkpoint",
    "base_policy": "a base policy",
    "datapool": "a datapool",
    "checkpoint": "a checkpoint",
}
"""How messages refer to inputs; all others are tables and keep their names."""


@dataclass(frozen=True)
class State:
    """A stage's output in a cell: usable if ``fresh``; otherwise ``reason`` says why not."""

    kind: Literal["fresh", "missing", "stale", "blocked"]
    reason: str = ""


class Freshness:
    """The current states of one experiment's cells in the store.

    A stage is *stale* when its inputs have been replaced or its settings have changed since it was
    computed, here or anywhere upstream; *blocked* when a blocking check failed on it or upstream.
    """

    def __init__(self, store: ArtifactStore, name: str, experiment: Experiment) -> None:
        self.store, self.name, self.experiment = store, name, experiment
        self._states: dict[tuple[int, str], State] = {}
        self._pointers: dict[tuple[int, str], Pointer | None] = {}

    def pointer(self, iteration: int, stage: str) -> Pointer | None:
        """A cell's pointer to its artifact; None if its stage has no output yet."""
        at = (iteration, stage)
        if at not in self._pointers:
            self._pointers[at] = self.store.pointer(self.name, iteration, stage)
        return self._pointers[at]

    def policy_hash(self, iteration: int) -> str | None:
        """The hash of the policy that an iteration samples from; None if that does not exist yet."""
        if iteration == 1 or self.experiment.method.trains != "policy":
            return base_policy(self.experiment).policy_hash
        pointer = self.pointer(iteration - 1, "checkpoint")
        return None if pointer is None else str(pointer.artifact.manifest["facts"]["policy_hash"])

    def state(self, iteration: int, stage: str) -> State:
        """The state of a stage's output in a cell."""
        at = (iteration, stage)
        if at not in self._states:
            self._states[at] = self._state(iteration, stage)
        return self._states[at]

    def iteration(self, iteration: int) -> State:
        """The state of a whole iteration: that of its first stage that is not fresh."""
        states = (self.state(iteration, stage) for stage in STAGES)
        return next((state for state in states if state.kind != "fresh"), State("fresh"))

    def _state(self, iteration: int, stage: str) -> State:
        pointer = self.pointer(iteration, stage)
        place = f"{stage} of {self.name}, iteration {iteration},"
        if pointer is None:
            return State("missing", f"{place} does not exist")
        for name, key in pointer.inputs.items():
            now, state = self._upstream(iteration, name, key)
            if state.kind != "fresh":
                return State("stale" if state.kind == "missing" else state.kind, state.reason)
            if now != key:
                what = CALLED.get(name, name.replace("_", " ").replace("@", " of iteration "))
                return State("stale", f"{place} was computed from {what} replaced since then")
        changes = settings_diff(pointer.settings, stage_settings(self.experiment, stage, iteration))
        if changes:
            return State("stale", f"{place} was computed with different settings ({'; '.join(changes)})")
        failed = [check for check, passed in pointer.checks.items() if not passed]
        if failed:
            return State("blocked", f"{place} failed its check {', '.join(failed)}")
        return State("fresh")

    def _upstream(self, iteration: int, name: str, key: str) -> tuple[str | None, State]:
        """The current key and state of the input that an artifact lists as ``name``."""
        if name == "base_policy":
            return base_policy(self.experiment).policy_hash, State("fresh")
        if name in ("policy", "trained_policy"):
            k = iteration + (name == "trained_policy")
            sampled = k > 1 and self.experiment.method.trains == "policy"
            return self.policy_hash(k), self.state(k - 1, "checkpoint") if sampled else State("fresh")
        if name == "source":
            return source_hash(training_prompts(self.experiment)), State("fresh")
        if name == "prompts":
            return evaluation_source(evaluation_prompts(self.experiment)), State("fresh")
        if name.startswith("prompts of "):
            return further_prompts(self.experiment).get(name), State("fresh")
        if name.startswith(trained.INPUTS):
            experiment, _, iteration_of = name.partition(" ")[2].rpartition("@")
            pointer = self.store.pointer(experiment, int(iteration_of), "checkpoint")
            return (pointer.artifact.key if pointer else None), State("fresh")
        stage, _, origin = name.partition("@")
        if stage not in STAGES:
            return key, State("fresh")  # weights from a query: fixed at the draw
        at = int(origin) if origin else iteration
        pointer = self.pointer(at, stage)
        return (pointer.artifact.key if pointer else None), self.state(at, stage)
