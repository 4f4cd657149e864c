"""What can be removed from a store: leftovers of interrupted work, and artifacts that no cell points to any more.

Artifacts that a cell points to stay, and so do their inputs, however far back: a stale cell's inputs are no
longer any cell's output, but still show where its numbers come from. The ledger of judge calls is not an
artifact, and stays.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from resources.store import ArtifactStore
from resources.store.artifact import Artifact, artifact_folder, read_manifest
from resources.store.attempts import NAME, living
from resources.store.cleaning import REMOTE_LEFTOVER, sweep_artifact
from resources.store.durable import ArtifactError, readable_errors
from textalign_dagster.loop.stages import (
    EVALUATION_DIVERGENCE,
    EVALUATION_FLUENCY,
    EVALUATION_LM_EVAL,
    EVALUATION_RED_TEAM,
    EVALUATION_SAMPLING,
    REFERENCE,
    SAMPLED_CHUNK,
    STAGES,
)

CHUNKS, PARTS, LOG_PROBS, ATTEMPTS, TRAININGS, UNREFERENCED = (
    "chunks of samplings",
    "parts of evaluations",
    "log-probabilities",
    "dead attempts",
    "unfinished trainings",
    "artifacts without a cell",
)
WHY = {
    CHUNKS: "of interrupted sampling; the same sampling would resume from them",
    PARTS: "samples of policies that no evaluation measures and no cell has any more",
    LOG_PROBS: "under policies that no cell has any more; a training run that needs them would recompute them",
    ATTEMPTS: "of killed processes; nothing reads them",
    TRAININGS: "snapshots of interrupted training runs; the same training would resume from them",
    UNREFERENCED: "no cell points to them or to anything computed from them: settings were changed or samples "
    "were drawn again; going back to those settings would recompute them",
}
"""Kind → why it can be removed."""

EVALUATION_PARTS = (
    EVALUATION_SAMPLING,
    EVALUATION_FLUENCY,
    EVALUATION_DIVERGENCE,
    EVALUATION_RED_TEAM,
    EVALUATION_LM_EVAL,
)

Place = tuple[str, str]
"""Stage and key of an artifact."""


@dataclass(frozen=True)
class Removable:
    """Something that can be removed."""

    kind: str
    place: str  # where it is: a path or URL
    bytes: int
    written: datetime  # its newest file
    artifact: Place | None = None  # the one it is, or (an attempt) would have become


@dataclass
class Held:
    """The files of one artifact and of the attempts at it."""

    manifest: Mapping[str, Any] | None = None  # None: never published
    attempts: dict[str, list[tuple[int, datetime]]] = field(default_factory=dict)

    @property
    def published(self) -> str | None:
        return None if self.manifest is None else str(self.manifest["attempt"])


def removable(
    store: ArtifactStore, home: Path, *, older_than: timedelta, unreferenced: bool = False
) -> list[Removable]:
    """What can be removed, sorted by kind.

    Args:
        home: the folder with ``unfinished``, which holds interrupted trainings.
        older_than: anything written more recently is left out; dead attempts on this machine are identified
            by their locks, whatever their age.
        unreferenced: whether artifacts that no cell needs are also listed.

    Raises:
        ArtifactError: a manifest or a pointer cannot be read, so it is unknown what is needed.
    """
    held, latest = _held(store), datetime.now(UTC) - older_than
    kept = _needed(store, held) if unreferenced else set(held)
    kept_parts = _kept_parts(store, held, kept)
    found = _trainings(home)
    for place, one in held.items():
        kind = _kind(place, kept, kept_parts)
        if kind is not None and one.published is not None:
            files = one.attempts.get(one.published) or [(0, latest)]
            found.append(_listed(kind, store.storage.place(artifact_folder(*place)), files, place))
    found = [one for one in found if one.written <= latest] + _dead_attempts(store, held, older_than)
    return sorted(found, key=lambda one: (list(WHY).index(one.kind), one.place))


def remove(store: ArtifactStore, found: Iterable[Removable], older_than: timedelta) -> None:
    """Removes what `removable` found.

    Raises:
        ArtifactError: a process is writing to the store, or something cannot be removed.
    """
    refuse_while_written(store)
    for one in found:
        if one.kind == ATTEMPTS and one.artifact is not None:
            sweep_artifact(store.storage, store.local, *one.artifact, max(older_than, REMOTE_LEFTOVER))
        elif one.artifact is not None:
            store.remove(*one.artifact)
        else:
            with readable_errors(Path(one.place), Path(one.place), "remove"):
                shutil.rmtree(one.place)


def refuse_while_written(store: ArtifactStore) -> None:
    """Raises `ArtifactError` while a process on this machine is computing an artifact."""
    for folder in sorted(store.local.glob("artifacts/*/*/")):
        for name in living(folder):
            raise ArtifactError(
                f"{folder / name} is being written by a running process; nothing was removed: wait for "
                "it, or stop it"
            )


def forgotten(store: ArtifactStore, known: Iterable[str]) -> list[str]:
    """Experiments that have cells but are not among the known ones; their artifacts still count as needed."""
    return sorted(set(store.cells()["experiment"]).difference(known))


def _held(store: ArtifactStore) -> dict[Place, Held]:
    """Everything below ``artifacts/``, sorted by name."""
    held: dict[Place, Held] = {}
    for path, facts in sorted(store.storage.entries("artifacts").items()):
        parts = path.split("/")
        if len(parts) >= 4:
            one = held.setdefault((parts[1], parts[2]), Held())
            if len(parts) > 4:
                one.attempts.setdefault(parts[3], []).append(facts)
    for place, manifest in zip(
        held, store.each(lambda at: read_manifest(store.storage, *at), held), strict=True
    ):
        held[place].manifest = manifest
    return held


def _needed(store: ArtifactStore, held: Mapping[Place, Held]) -> set[Place]:
    """What cells point to, and all direct and indirect inputs of that."""
    by_input: dict[str, list[Place]] = {}  # by how inputs refer to an artifact: its key, or its policy's hash
    for place, one in held.items():
        if one.manifest is not None:
            by_input.setdefault(place[1], []).append(place)
            policy = one.manifest["facts"].get("policy_hash")
            if policy is not None:
                by_input.setdefault(str(policy), []).append(place)
    needed: set[Place] = set()
    left: list[Place] = [(stage, key) for stage, key in store.cells().select("stage", "key").iter_rows()]
    while left:
        place = left.pop()
        if place not in needed:
            needed.add(place)
            manifest = held[place].manifest if place in held else None
            for key in (manifest or {"inputs": {}})["inputs"].values():
                left += by_input.get(str(key), [])
    return needed


def _kind(place: Place, kept: set[Place], kept_parts: set[Place]) -> str | None:
    """The kind under which a published artifact can be removed; None: it stays."""
    stage, _ = place
    if stage == SAMPLED_CHUNK:
        return CHUNKS
    if stage in EVALUATION_PARTS:
        return None if place in kept_parts else PARTS
    if stage == REFERENCE:
        return None if place in kept_parts else LOG_PROBS
    # Stages that this version does not know may belong to a later one, so they stay.
    return UNREFERENCED if stage in STAGES and place not in kept else None


def _kept_parts(store: ArtifactStore, held: Mapping[Place, Held], kept: set[Place]) -> set[Place]:
    """The parts of evaluations, and the log-probabilities, that can still be reused while the ``kept`` artifacts
    stay."""
    policies: set[str] = set()
    for place in kept:
        manifest = held[place].manifest if place in held else None
        if manifest is None or place[0] not in STAGES:
            continue
        policies.update(map(str, manifest["inputs"].values()))
        policies.add(str(manifest["facts"].get("policy_hash")))
        if place[0] == "evaluation":  # baselines and human answers are only in its table
            artifact = Artifact(*place, manifest, True, store.storage, store.local)
            policies.update(artifact.frame("scores")["policy_hash"])

    def of(part: str, given: str, wanted: Collection[str]) -> set[Place]:
        """The parts of this kind whose input ``given`` is in ``wanted``."""
        return {
            place for place, one in held.items()
            if place[0] == part and one.manifest is not None and one.manifest["inputs"][given] in wanted
        }  # fmt: skip

    # Samples of a KL's reference belong to no kept policy, but a kept divergence was computed on them.
    divergences = of(EVALUATION_DIVERGENCE, "model", policies)
    read = {held[place].manifest["inputs"]["samples"] for place in divergences}  # type: ignore[index]
    samples = of(EVALUATION_SAMPLING, "policy", policies) | {(EVALUATION_SAMPLING, key) for key in read}
    tried = of(EVALUATION_RED_TEAM, "policy", policies) | of(EVALUATION_LM_EVAL, "policy", policies)
    log_probs = of(REFERENCE, "policy", policies)
    return (
        samples
        | divergences
        | tried
        | log_probs
        | of(EVALUATION_FLUENCY, "samples", {key for _, key in samples})
    )


def _dead_attempts(
    store: ArtifactStore, held: Mapping[Place, Held], older_than: timedelta
) -> list[Removable]:
    """Attempts whose process is gone."""
    found = []
    for place, one in held.items():
        parent = artifact_folder(*place)
        alive = living(store.local / parent)
        for name, files in one.attempts.items():
            if not NAME.fullmatch(name) or name == one.published or name in alive:
                continue
            dead = _listed(ATTEMPTS, store.storage.place(f"{parent}/{name}"), files, place)
            # On an object store only age shows that it is abandoned.
            if not store.is_remote or dead.written <= datetime.now(UTC) - max(older_than, REMOTE_LEFTOVER):
                found.append(dead)
    if store.is_remote:  # attempts filled on this machine but not yet uploaded
        for folder in sorted(store.local.glob("artifacts/*/*/*/")):
            place = (folder.parent.parent.name, folder.parent.name)
            published = held[place].published if place in held else None
            if NAME.fullmatch(folder.name) and folder.name not in {published, *living(folder.parent)}:
                found.append(_listed(ATTEMPTS, str(folder), _files(folder), place))
    return found


def _trainings(home: Path) -> list[Removable]:
    """Folders of interrupted trainings, each named by the key of its checkpoint."""
    folders = sorted(path for path in (home / "unfinished").glob("*") if path.is_dir())
    return [_listed(TRAININGS, str(folder), _files(folder), None) for folder in folders]


def _files(folder: Path) -> list[tuple[int, datetime]]:
    facts = [path.stat() for path in [folder, *folder.rglob("*")] if path.exists()]
    return [(fact.st_size, datetime.fromtimestamp(fact.st_mtime, UTC)) for fact in facts]


def _listed(
    kind: str, place: str, files: Sequence[tuple[int, datetime]], artifact: Place | None
) -> Removable:
    return Removable(kind, place, sum(size for size, _ in files), max(when for _, when in files), artifact)
