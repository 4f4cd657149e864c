"""A published artifact as its readers see it: tables, folders, and its provenance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from resources.store.attempts import check_name
from resources.store.durable import ArtifactError
from resources.store.manifest import decode, file_facts
from resources.store.storage import Storage


def artifact_folder(stage: str, key: str) -> str:
    """The folder of an artifact's manifest and attempts, relative to the store's root."""
    check_name(stage, "stage")
    check_name(key, "key")
    return f"artifacts/{stage}/{key}"


def read_manifest(storage: Storage, stage: str, key: str) -> dict[str, Any] | None:
    """The manifest, or None if the artifact does not exist."""
    path = f"{artifact_folder(stage, key)}/manifest.json"
    data = storage.read(path)
    return None if data is None else decode(data, storage.place(path))


@dataclass(frozen=True)
class Artifact:
    """Immutable outputs of one stage.

    ``reused``: it existed before the call that returned it. ``manifest`` holds the inputs'
    keys, settings, versions, seed, code revision, environment, cost facts and the files.
    """

    stage: str
    key: str
    manifest: Mapping[str, Any] = field(repr=False)
    reused: bool = field(compare=False)
    storage: Storage = field(compare=False, repr=False)
    local: Path = field(
        compare=False, repr=False
    )  # the root of local files: the store itself, or the cache of an object store

    @property
    def attempt(self) -> str:
        """The name of the attempt that was published; not part of the identity."""
        return str(self.manifest["attempt"])

    @property
    def tables(self) -> dict[str, Mapping[str, Any]]:
        """Table name → its entry in the manifest (path, rows, columns, bytes, sha256)."""
        return {file["table"]: file for file in self.manifest["files"] if "table" in file}

    @property
    def folders(self) -> list[str]:
        return list(self.manifest["folders"])

    @property
    def prefix(self) -> str:
        """The artifact's folder, relative to the store's root."""
        return f"{artifact_folder(self.stage, self.key)}/{self.attempt}"

    def frame(self, name: str) -> pl.DataFrame:
        """A table, read in full.

        Raises:
            ArtifactError: no such table here, or its file is not readable Parquet.
        """
        try:
            return pl.read_parquet(self._local_file(self._table(name)), glob=False)
        except (pl.exceptions.PolarsError, OSError) as error:
            raise self._damaged(f"{name}.parquet cannot be read ({str(error).splitlines()[0]})") from error

    def path(self, name: str) -> Path:
        """The local path of a folder, e.g. a model (downloaded once from an object store)."""
        if name not in self.folders:
            raise ArtifactError(
                f"artifact {self.stage} {self.key} has no folder {name!r}; it has {self.folders}"
            )
        folder = self.local / self.prefix / name
        folder.mkdir(parents=True, exist_ok=True)
        for file in self.manifest["files"]:
            if file["path"].startswith(f"{name}/"):
                self._local_file(file)
        return folder

    def url(self, name: str) -> str:
        """Where a table or a folder is: an absolute local path, or a URL of the object store."""
        if name in self.folders:
            return self.storage.place(f"{self.prefix}/{name}")
        return self.storage.place(f"{self.prefix}/{self._table(name)['path']}")

    def verify(self) -> None:
        """Read every file and compare its content hash with the manifest's.

        Raises:
            ArtifactError: names the first file that differs.
        """
        for file in self.manifest["files"]:
            path = self._local_file(file)
            if file_facts(path.parent, path)["sha256"] != file["sha256"]:
                raise self._damaged(f"{file['path']} has changed since it was written (its hash differs)")

    def _table(self, name: str) -> Mapping[str, Any]:
        if name not in self.tables:
            raise ArtifactError(
                f"artifact {self.stage} {self.key} has no table {name!r}; it has {sorted(self.tables)}"
            )
        return self.tables[name]

    def _local_file(self, file: Mapping[str, Any]) -> Path:
        target: Path = self.local / self.prefix / file["path"]
        if not target.is_file() or target.stat().st_size != file["bytes"]:
            self.storage.download(f"{self.prefix}/{file['path']}", target)
            if file_facts(target.parent, target)["sha256"] != file["sha256"]:
                raise self._damaged(f"{file['path']} has changed since it was written (its hash differs)")
        return target

    def _damaged(self, what: str) -> ArtifactError:
        return damaged(self.storage, self.stage, self.key, [what])


def damaged(storage: Storage, stage: str, key: str, what: list[str]) -> ArtifactError:
    """The error for an artifact whose files do not match its manifest."""
    more = f" and {len(what) - 3} more" if len(what) > 3 else ""
    return ArtifactError(
        f"artifact {stage} {key} is damaged: {'; '.join(what[:3])}{more}. "
        f"Remove {storage.place(artifact_folder(stage, key))} and run the stage again"
    )
