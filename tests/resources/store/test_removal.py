"""What `textalign clean` finds in a store: leftovers, and what no cell needs; never anything that one does."""

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
    """An iteration from the draw of its prompts to its evaluation, with its parts; cells point at it, or none does."""
    made: dict[str, Artifact] = {}
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
        made[stage] = make(store, stage, f"{name}-{stage}", inputs, policy=policy)
        if experiment is not None and not stage.startswith("evaluation_"):
            assign(store, experiment, made[stage])
    return made


def found(
    store: ArtifactStore, *, older_than: timedelta = NOW, unreferenced: bool = False
) -> dict[str, set[str]]:
    """Kind → what of it is found, by its folder's name."""
    kinds: dict[str, set[str]] = {}
    home = store.local.parent
    for one in removable(store, home, older_than=older_than, unreferenced=unreferenced):
        kinds.setdefault(one.kind, set()).add(one.place.rpartition("/")[2])
    return kinds


def apply(store: ArtifactStore, *, unreferenced: bool = False) -> None:
    home = store.local.parent
    remove(store, removable(store, home, older_than=NOW, unreferenced=unreferenced), NOW)


def everything(store: ArtifactStore) -> set[str]:
    return {path.split("/")[2] for path in store.storage.entries("artifacts")}


def test_what_cells_point_at_stays(store: ArtifactStore) -> None:
    kept, gone = lineage(store, "kept", "one"), lineage(store, "gone", None)
    assert found(store) == {}
    stages = {artifact.key for stage, artifact in gone.items() if not stage.startswith("evaluation_")}
    parts = {"gone-evaluation_sampling", "gone-evaluation_fluency"}
    assert found(store, unreferenced=True) == {UNREFERENCED: stages, PARTS: parts}
    apply(store, unreferenced=True)
    assert everything(store) == {artifact.key for artifact in kept.values()}
    for artifact in kept.values():
        again = store.find(artifact.stage, artifact.key)
        assert again is not None
        again.verify()
    assert found(store, unreferenced=True) == {}


def test_what_a_cell_was_made_from_stays(store: ArtifactStore) -> None:
    """The draw was made anew, and the checkpoint: the evaluation is stale, and still has its own past."""
    old = lineage(store, "old", "one")
    assign(store, "one", make(store, "prompt_draws", "new-prompt_draws", {"source": "prompts"}))
    assign(
        store, "one", make(store, "checkpoint", "new-checkpoint", {"datapool": "old-datapool"}, policy="new")
    )
    (store.local / "cells/one/001/generations.json").unlink()
    assert found(store, unreferenced=True) == {}
    shutil.rmtree(store.local / "cells" / "one")
    assert old["checkpoint"].key in found(store, unreferenced=True)[UNREFERENCED]


def test_a_shared_artifact_stays_until_its_last_cell_is_gone(store: ArtifactStore) -> None:
    for artifact in lineage(store, "shared", "one").values():
        if not artifact.stage.startswith("evaluation_"):
            assign(store, "two", artifact)
    shutil.rmtree(store.local / "cells" / "one")
    assert found(store, unreferenced=True) == {}
    shutil.rmtree(store.local / "cells" / "two")
    assert len(found(store, unreferenced=True)[UNREFERENCED]) == 6


def test_parts_stay_as_long_as_an_evaluation_may_want_them(store: ArtifactStore) -> None:
    """Its judge was out of reach: the checkpoint's samples are there, its evaluation is not yet."""
    made = lineage(store, "waiting", "one")
    store.remove("evaluation", made["evaluation"].key)
    (store.local / "cells/one/001/evaluation.json").unlink()
    make(store, "evaluation_sampling", "of-baseline", {"policy": "baseline", "prompts": "held out"})
    assert found(store) == {PARTS: {"of-baseline"}}
    # Of baselines, only the table of an evaluation tells.
    assign(
        store,
        "one",
        make(store, "evaluation", "with-baseline", {"base_policy": "base"}, policy="baseline"),
        0,
    )
    assert found(store) == {}


def test_log_probabilities_stay_as_long_as_a_cell_has_their_policy(store: ArtifactStore) -> None:
    made = lineage(store, "a", "mine")
    for policy in ("base", "a-policy", "gone"):
        make(store, "reference_log_probs", f"of-{policy}", {"policy": policy})
    assert made["checkpoint"].manifest["inputs"]["policy"] == "base"
    assert found(store) == {LOG_PROBS: {"of-gone"}}


def test_attacks_and_harness_stay_as_long_as_their_policy(store: ArtifactStore) -> None:
    lineage(store, "a", "mine")
    for stage in ("evaluation_red_team", "evaluation_lm_eval"):
        for policy in ("a-policy", "gone"):
            make(store, stage, f"{stage}-{policy}", {"policy": policy})
    assert found(store) == {PARTS: {"evaluation_red_team-gone", "evaluation_lm_eval-gone"}}


def test_leftovers_of_interrupted_work(store: ArtifactStore) -> None:
    made = lineage(store, "kept", "one")
    make(store, CHUNK, "chunk", {"policy": "base"})
    parent = store.local / "artifacts" / "checkpoint" / made["checkpoint"].key
    dead = parent / "20260101T000000-00000000"
    dead.mkdir()
    (dead / "half").write_bytes(bytes(10))
    training = store.local.parent / "unfinished" / "key-of-a-training"
    training.mkdir(parents=True)
    (training / "snapshot").write_bytes(bytes(100))
    assert found(store) == {CHUNKS: {"chunk"}, ATTEMPTS: {dead.name}, TRAININGS: {"key-of-a-training"}}
    apply(store)
    assert found(store) == {} and not dead.exists() and not training.exists()
    assert everything(store) == {artifact.key for artifact in made.values()}
    made["checkpoint"].verify()


def test_what_is_young_is_left_alone(store: ArtifactStore) -> None:
    make(store, CHUNK, "chunk")
    make(store, "checkpoint", "checkpoint")
    assert found(store, older_than=timedelta(hours=1), unreferenced=True) == {}
    for path in (store.local / "artifacts" / CHUNK).rglob("*"):
        os.utime(path, (time.time() - 7200,) * 2)
    assert found(store, older_than=timedelta(hours=1), unreferenced=True) == {CHUNKS: {"chunk"}}


def test_nothing_goes_while_somebody_writes(store: ArtifactStore) -> None:
    make(store, CHUNK, "chunk")
    attempt = Attempt(store.local / "artifacts" / "generations" / "under-way")
    (attempt.folder / "half").write_bytes(bytes(10))
    assert found(store) == {CHUNKS: {"chunk"}}  # the attempt lives
    with pytest.raises(ArtifactError, match=f"{attempt.name} is being written by a running process"):
        apply(store)
    assert everything(store) == {"chunk", "under-way"}
    attempt.release(remove=True)
    apply(store)
    assert everything(store) == set()


@pytest.mark.parametrize(
    "damage",
    [
        lambda root: (root / "cells/one/001/checkpoint.json").write_text("{"),
        lambda root: (root / "artifacts/checkpoint/kept-checkpoint/manifest.json").write_text("{"),
        lambda root: next(root.glob("artifacts/evaluation/kept-evaluation/*/scores.parquet")).write_text("?"),
    ],
)
def test_where_it_cannot_be_told_what_is_needed_nothing_goes(
    store: ArtifactStore, damage: Callable[[Path], object]
) -> None:
    lineage(store, "kept", "one")
    lineage(store, "gone", None)
    before = everything(store)
    damage(store.local)
    with pytest.raises(ArtifactError):
        apply(store, unreferenced=True)
    assert everything(store) == before


def test_stages_of_a_later_version_are_nobodys_to_remove(store: ArtifactStore) -> None:
    make(store, "unheard_of", "key")
    assert found(store, unreferenced=True) == {}
