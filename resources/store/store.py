"""The artifact store: outputs of stages, named by what they were computed from.

An artifact is a set of Parquet tables and folders with a manifest. Its key is a hash of its inputs
and settings, so requesting it again finds it. It exists from the moment its manifest does, which is
created once, atomically, and last; everything else is an attempt, which is invisible. Cells of the
grid (experiment, iteration, stage) point to artifacts, and several cells may share one.

Layout below the root::

    artifacts/{stage}/{key}/manifest.json
    artifacts/{stage}/{key}/{attempt}/{table}.parquet, {folder}/…
    cells/{experiment}/{iteration:03d}/{stage}.json
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import polars as pl

from resources.store import manifest as manifests
from resources.store.artifact import Artifact, artifact_folder, damaged, read_manifest
from resources.store.attempts import Attempt, Draft
from resources.store.cells import Pointer, cells_frame, pointer_path, read_pointer
from resources.store.cleaning import REMOTE_LEFTOVER, clean, sweep_artifact
from resources.store.durable import ArtifactError, full_disk, full_disk_error, readable_errors
from resources.store.storage import LocalStorage, open_storage
from textalign_dagster.ids import content_hash

__all__ = ["Artifact", "ArtifactError", "ArtifactStore", "Draft"]

REQUESTS = 16  # concurrently, to an object store
T = TypeVar("T")
R = TypeVar("R")


class ArtifactStore:
    """Artifacts below a local folder or the URL of an object store.

    On an object store, artifacts are written and read through a local cache: ``cache``, else
    ``$TEXTALIGN_CACHE``, else ``~/.cache/textalign``.
    """

    def __init__(self, url: str | os.PathLike[str], *, cache: Path | None = None) -> None:
        self.storage = open_storage(os.fspath(url))
        self.root = self.storage.place("").rstrip("/")
        self.is_remote = not isinstance(self.storage, LocalStorage)
        if isinstance(self.storage, LocalStorage):
            self.local = self.storage.root
        else:
            self.local = (cache or _default_cache()) / content_hash("store", self.root)

    def find(self, stage: str, key: str) -> Artifact | None:
        """The artifact, or None if it does not exist.

        Raises:
            ArtifactError: its manifest is unreadable, or files are missing or of another size.
        """
        manifest = read_manifest(self.storage, stage, key)
        if manifest is None:
            return None
        artifact = Artifact(stage, key, manifest, True, self.storage, self.local)
        start = len(artifact.prefix) + 1
        entries = self.storage.entries(artifact.prefix).items()
        wrong = manifests.damages(manifest, {path[start:]: size for path, (size, _) in entries})
        if wrong:
            raise damaged(self.storage, stage, key, wrong)
        return artifact

    def make(
        self,
        stage: str,
        key: str,
        produce: Callable[[Draft], None],
        *,
        inputs: Mapping[str, str],
        settings: Mapping[str, Any],
        versions: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> Artifact:
        """The existing artifact (``reused``), or the one that ``produce`` fills and this publishes.

        An exception in ``produce`` propagates, and nothing is published. If several processes make
        the same key concurrently, the first to publish wins and all return its artifact.

        Raises:
            ArtifactError: disk full, secrets or non-JSON among the settings, a damaged artifact.
        """
        recorded = {"inputs": inputs, "settings": settings, "versions": versions or {}}
        for what, value in recorded.items():
            manifests.check_plain(value, what)
        found = self.find(stage, key)
        sweep_artifact(self.storage, self.local, stage, key)
        if found is not None:
            return found
        self.storage.ready()
        folder = self.local / artifact_folder(stage, key)
        with readable_errors(self.local, folder, "write to"):
            attempt = Attempt(folder)
        try:
            draft = Draft(attempt.name, attempt.folder)
            started = time.perf_counter()
            produce(draft)
            seconds = time.perf_counter() - started
            files, folders = draft.seal()
            manifest = manifests.build(
                stage=stage,
                key=key,
                attempt=attempt.name,
                seed=seed,
                seconds=seconds,
                facts=draft.facts,
                files=files,
                folders=folders,
                **recorded,
            )
            winner = self._publish(manifest)
        except BaseException as error:
            self._give_up(stage, key, attempt)
            if full_disk(error):
                raise full_disk_error(self.local, error) from error
            raise
        won = winner["attempt"] == attempt.name
        attempt.release(remove=not won)
        return Artifact(stage, key, winner, not won, self.storage, self.local)

    def assign(
        self,
        experiment: str,
        iteration: int,
        stage: str,
        artifact: Artifact,
        *,
        settings: Mapping[str, Any],
        checks: Mapping[str, bool],
    ) -> None:
        """Point the cell to an artifact of that stage, replacing any earlier one."""
        path = pointer_path(experiment, iteration, stage)
        manifests.check_plain(settings, "settings")
        if artifact.stage != stage:
            raise ArtifactError(
                f"{path}: an artifact of stage {artifact.stage!r} is not an output of {stage!r}"
            )
        before = read_pointer(self.storage, path)
        paid_here = before is not None and before["key"] == artifact.key and not before["reused"]
        pointer = {
            "format": manifests.FORMAT,
            "experiment": experiment,
            "iteration": iteration,
            "stage": stage,
            "key": artifact.key,
            "reused": artifact.reused and not paid_here,  # a rerun does not change who paid
            "checks": {name: bool(passed) for name, passed in checks.items()},
            "settings": dict(settings),
            "inputs": dict(artifact.manifest["inputs"]),
            "assigned_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        }
        self.storage.replace(path, manifests.encode(pointer))

    def pointer(self, experiment: str, iteration: int, stage: str) -> Pointer | None:
        """The cell's pointer; None if its stage has no output yet.

        Raises:
            ArtifactError: it points to an artifact that is missing or damaged.
        """
        path = pointer_path(experiment, iteration, stage)
        found = read_pointer(self.storage, path)
        if found is None:
            return None
        artifact = self.find(stage, found["key"])
        if artifact is None:
            raise ArtifactError(
                f"{self.storage.place(path)} points at artifact {stage} {found['key']}, which is "
                f"not in the store: run stage {stage!r} of {experiment}|{iteration:03d} again, "
                "or remove that file"
            )
        return Pointer(
            experiment,
            iteration,
            stage,
            artifact,
            found["settings"],
            found["checks"],
            found["inputs"],
            found["reused"],
            datetime.fromisoformat(found["assigned_at"]),
        )

    def cells(self) -> pl.DataFrame:
        """Every cell's outputs (`CELLS`); artifacts are not opened."""
        paths = [
            path
            for path in self.storage.entries("cells")
            if path.endswith(".json") and not path.rsplit("/", 1)[-1].startswith(".")
        ]
        pointers = self.each(lambda path: read_pointer(self.storage, path), paths)
        return cells_frame(p for p in pointers if p is not None)

    def remove(self, stage: str, key: str) -> None:
        """Remove an artifact, manifest first, so that the next `make` recomputes it."""
        folder = artifact_folder(stage, key)
        self.storage.remove(f"{folder}/manifest.json")
        self.storage.remove(folder)
        shutil.rmtree(self.local / folder, ignore_errors=True)

    def clean(self, *, older_than: timedelta = REMOTE_LEFTOVER) -> list[str]:
        """Remove what killed processes left behind; returns the paths. Published artifacts stay.

        ``older_than`` applies only to uploads to object stores; locally, locks show who is alive.
        """
        return clean(self.storage, self.local, older_than)

    def each(self, function: Callable[[T], R], items: Iterable[T]) -> list[R]:
        """``function`` applied to every item, in order; concurrently on an object store."""
        if not self.is_remote:
            return [function(item) for item in items]
        with ThreadPoolExecutor(REQUESTS) as pool:
            return list(pool.map(function, items))

    def _publish(self, manifest: dict[str, Any]) -> dict[str, Any]:
        """Publish, unless another process was first; returns the manifest now in force."""
        stage, key = manifest["stage"], manifest["key"]
        parent = artifact_folder(stage, key)
        folder = f"{parent}/{manifest['attempt']}"
        for file in manifest["files"]:
            self.storage.upload(f"{folder}/{file['path']}", self.local / folder / file["path"])
        self.storage.create(f"{parent}/manifest.json", manifests.encode(manifest))
        winner = read_manifest(self.storage, stage, key)  # also right if a retried put met its own first try
        if winner is None:
            raise ArtifactError(f"{stage} {key} was removed while being published: run it again")
        if winner["attempt"] != manifest["attempt"] and self.is_remote:
            self.storage.remove(folder)
        return winner

    def _give_up(self, stage: str, key: str, attempt: Attempt) -> None:
        """Remove an attempt that failed, unless the failure came after it was published."""
        published = False
        with contextlib.suppress(ArtifactError):  # the first error is the one to report
            winner = read_manifest(self.storage, stage, key)
            published = winner is not None and winner["attempt"] == attempt.name
            if self.is_remote and not published:
                self.storage.remove(f"{artifact_folder(stage, key)}/{attempt.name}")
        attempt.release(remove=not published)


def _default_cache() -> Path:
    chosen = os.environ.get("TEXTALIGN_CACHE")
    return Path(chosen) if chosen else Path.home() / ".cache" / "textalign"
