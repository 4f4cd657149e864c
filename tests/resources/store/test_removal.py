"""What `textalign clean` finds in a store: leftovers and artifacts that no cell needs, never one that is needed."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path

import polars as pl
import pytest

from resources.engines.chunks import CHUNK
from resources.store import Artifact, ArtifactError, ArtifactStore, Draft
from resources.store.attempts import Attempt
from resources.store.removal import (
    ATTEMPTS,
    CHUNKS,
    LOG_PROBS,
    PARTS,
    TRAININGS,
    UNREFERENCED,
    removable,
    remove,
)

ROWS = pl.Schema({"policy_hash": pl.String()})
NOW = timedelta(0)


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def make(
    store: ArtifactStore, stage: str, key: str, inputs: Mapping[str, str] = {}, *, policy: str | None = None
) -> Artifact:
    def produce(draft: Draft) -> None:
        draft.write("scores", pl.DataFrame({"policy_hash": [policy]}, ROWS), ROWS)
        (draft.folder("model") / "weights").write_bytes(bytes(1000))
        if policy is not None and stage == "checkpoint":
            draft.record(policy_hash=policy)

    return store.make(stage, key, produce, inputs=inputs, settings={})


def assign(store: ArtifactStore, experiment: str, artifact: Artifact, iteration: int = 1) -> None:
    store.assign(experiment, iteration, artifact.stage, artifact, settings={}, checks={})


def lineage(store: ArtifactStore, name: str, experiment: str | None) -> dict[str, Artifact]:
    """All artifacts of an iteration, with the parts of its evaluation; cells point at them if ``experiment`` is given."""
    artifacts: dict[str, Artifact] = {}
    for stage, inputs in (
        ("prompt_draws", {"source": "prompts"}),
        ("generations", {"prompt_draws": f"{name}-prompt_draws", "policy": "base"}),
        ("feedback", {"generations": f"{name}-generations"}),
        ("datapool", {"feedback": f"{name}-feedback", "generations": f"{name}-generations"}),
        ("checkpoint", {"datapool": f"{name}-datapool", "policy": "base"}),
        ("evaluation_sampling", {"policy": f"{name}-policy", "prompts": "held out"}),
        ("evaluation_fluency", {"samples": f"{name}-evaluation_sampling", "model": "base"}),
        ("evaluation", {"trained_policy": f"{name}-policy", "base_policy": "base"}),
    ):
        policy = f"{name}-policy" if stage in ("checkpoint", "evaluation") else None
        artifacts[stage] = make(store, stage, f"{name}-{stage}", inputs, policy=policy)
        if experiment is not None and not stage.startswith("evaluation_"):
            assign(store, experiment, artifacts[stage])
    return artifacts


def removable_names(
    store: ArtifactStore, *, older_than: timedelta = NOW, unreferenced: bool = False
) -> dict[str, set[str]]:
    """Kind → the folder names of what is removable."""
    kinds: dict[str, set[str]] = {}
    home = store.local.parent
    for item in removable(store, home, older_than=older_than, unreferenced=unreferenced):
        kinds.setdefault(item.kind, set()).add(item.place.rpartition("/")[2])
    return kinds


def apply(store: ArtifactStore, *, unreferenced: bool = False) -> None:
    home = store.local.parent
    remove(store, removable(store, home, older_than=NOW, unreferenced=unreferenced), NOW)


def stored_names(store: ArtifactStore) -> set[str]:
    return {path.split("/")[2] for path in store.storage.entries("artifacts")}


def test_artifacts_that_cells_point_at_are_kept(store: ArtifactStore) -> None:
    kept, gone = lineage(store, "kept", "one"), lineage(store, "gone", None)
    assert removable_names(store) == {}
    stages = {artifact.key for stage, artifact in gone.items() if not stage.startswith("evaluation_")}
    parts = {"gone-evaluation_sampling", "gone-evaluation_fluency"}
    assert removable_names(store, unreferenced=True) == {UNREFERENCED: stages, PARTS: parts}
    apply(store, unreferenced=True)
    assert stored_names(store) == {artifact.key for artifact in kept.values()}
    for artifact in kept.values():
        again = store.find(artifact.stage, artifact.key)
        assert again is not None
        again.verify()
    assert removable_names(store, unreferenced=True) == {}


def test_the_inputs_of_a_cells_artifact_are_kept(store: ArtifactStore) -> None:
    """Draw and checkpoint were recomputed: the evaluation is stale, and keeps what it was computed from."""
    old = lineage(store, "old", "one")
    assign(store, "one", make(store, "prompt_draws", "new-prompt_draws", {"source": "prompts"}))
    assign(
        store, "one", make(store, "checkpoint", "new-checkpoint", {"datapool": "old-datapool"}, policy="new")
    )
    (store.local / "cells/one/001/generations.json").unlink()
    assert removable_names(store, unreferenced=True) == {}
    shutil.rmtree(store.local / "cells" / "one")
    assert old["checkpoint"].key in removable_names(store, unreferenced=True)[UNREFERENCED]


def test_a_shared_artifact_is_kept_until_its_last_cell_is_gone(store: ArtifactStore) -> None:
    for artifact in lineage(store, "shared", "one").values():
        if not artifact.stage.startswith("evaluation_"):
            assign(store, "two", artifact)
    shutil.rmtree(store.local / "cells" / "one")
    assert removable_names(store, unreferenced=True) == {}
    shutil.rmtree(store.local / "cells" / "two")
    assert len(removable_names(store, unreferenced=True)[UNREFERENCED]) == 6


def test_parts_are_kept_as_long_as_an_evaluation_may_need_them(store: ArtifactStore) -> None:
    """Its judge was unreachable: the checkpoint's samples exist, its evaluation does not yet."""
    artifacts = lineage(store, "waiting", "one")
    store.remove("evaluation", artifacts["evaluation"].key)
    (store.local / "cells/one/001/evaluation.json").unlink()
    make(store, "evaluation_sampling", "of-baseline", {"policy": "baseline", "prompts": "held out"})
    assert removable_names(store) == {PARTS: {"of-baseline"}}
    # Baselines are known only from the table of an evaluation.
    assign(
        store,
        "one",
        make(store, "evaluation", "with-baseline", {"base_policy": "base"}, policy="baseline"),
        0,
    )
    assert removable_names(store) == {}


def test_log_probabilities_are_kept_as_long_as_a_cell_has_their_policy(store: ArtifactStore) -> None:
    artifacts = lineage(store, "a", "mine")
    for policy in ("base", "a-policy", "gone"):
        make(store, "reference_log_probs", f"of-{policy}", {"policy": policy})
    assert artifacts["checkpoint"].manifest["inputs"]["policy"] == "base"
    assert removable_names(store) == {LOG_PROBS: {"of-gone"}}


def test_attacks_and_harness_results_are_kept_as_long_as_their_policy(store: ArtifactStore) -> None:
    lineage(store, "a", "mine")
    for stage in ("evaluation_red_team", "evaluation_lm_eval"):
        for policy in ("a-policy", "gone"):
            make(store, stage, f"{stage}-{policy}", {"policy": policy})
    assert removable_names(store) == {PARTS: {"evaluation_red_team-gone", "evaluation_lm_eval-gone"}}


def test_leftovers_of_interrupted_work_are_removed(store: ArtifactStore) -> None:
    artifacts = lineage(store, "kept", "one")
    make(store, CHUNK, "chunk", {"policy": "base"})
    parent = store.local / "artifacts" / "checkpoint" / artifacts["checkpoint"].key
    dead = parent / "20260101T000000-00000000"
    dead.mkdir()
    (dead / "half").write_bytes(bytes(10))
    training = store.local.parent / "unfinished" / "key-of-a-training"
    training.mkdir(parents=True)
    (training / "snapshot").write_bytes(bytes(100))
    assert removable_names(store) == {
        CHUNKS: {"chunk"},
        ATTEMPTS: {dead.name},
        TRAININGS: {"key-of-a-training"},
    }
    apply(store)
    assert removable_names(store) == {} and not dead.exists() and not training.exists()
    assert stored_names(store) == {artifact.key for artifact in artifacts.values()}
    artifacts["checkpoint"].verify()


def test_recent_leftovers_are_left_alone(store: ArtifactStore) -> None:
    make(store, CHUNK, "chunk")
    make(store, "checkpoint", "checkpoint")
    assert removable_names(store, older_than=timedelta(hours=1), unreferenced=True) == {}
    for path in (store.local / "artifacts" / CHUNK).rglob("*"):
        os.utime(path, (time.time() - 7200,) * 2)
    assert removable_names(store, older_than=timedelta(hours=1), unreferenced=True) == {CHUNKS: {"chunk"}}


def test_nothing_is_removed_while_a_process_is_writing(store: ArtifactStore) -> None:
    make(store, CHUNK, "chunk")
    attempt = Attempt(store.local / "artifacts" / "generations" / "under-way")
    (attempt.folder / "half").write_bytes(bytes(10))
    assert removable_names(store) == {CHUNKS: {"chunk"}}  # the attempt is still running
    with pytest.raises(ArtifactError, match=f"{attempt.name} is being written by a running process"):
        apply(store)
    assert stored_names(store) == {"chunk", "under-way"}
    attempt.release(remove=True)
    apply(store)
    assert stored_names(store) == set()


@pytest.mark.parametrize(
    "damage",
    [
        lambda root: (root / "cells/one/001/checkpoint.json").write_text("{"),
        lambda root: (root / "artifacts/checkpoint/kept-checkpoint/manifest.json").write_text("{"),
        lambda root: next(root.glob("artifacts/evaluation/kept-evaluation/*/scores.parquet")).write_text("?"),
    ],
)
def test_nothing_is_removed_if_it_is_unclear_what_is_needed(
    store: ArtifactStore, damage: Callable[[Path], object]
) -> None:
    lineage(store, "kept", "one")
    lineage(store, "gone", None)
    before = stored_names(store)
    damage(store.local)
    with pytest.raises(ArtifactError):
        apply(store, unreferenced=True)
    assert stored_names(store) == before


def test_stages_of_a_newer_version_are_never_removed(store: ArtifactStore) -> None:
    make(store, "unheard_of", "key")
    assert removable_names(store, unreferenced=True) == {}
