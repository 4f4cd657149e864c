"""One whole run of the toy loop, made once, read by many tests and copied by those that change it."""

from __future__ import annotations

import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from resources.store import Artifact, ArtifactStore
from tests.toy import environment, textalign, write_toys


@dataclass(frozen=True)
class Place:
    """A home, its experiments, and ``textalign`` in it."""

    folder: Path

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def experiments(self) -> Path:
        return self.folder / "experiments"

    @property
    def env(self) -> dict[str, str]:
        return environment(self.home, self.experiments)

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore(self.home / "store")

    def textalign(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """``textalign …`` here; see :func:`tests.toy.textalign`."""
        return textalign(*arguments, env=self.env, **options)

    def artifact(self, experiment: str, iteration: int, stage: str) -> Artifact:
        """What a cell points at."""
        pointer = self.store.pointer(experiment, iteration, stage)
        assert pointer is not None, f"{stage} of {experiment}, iteration {iteration}, was not made"
        return pointer.artifact

    def frame(self, experiment: str, iteration: int, stage: str, table: str | None = None) -> pl.DataFrame:
        """A table of a cell."""
        return self.artifact(experiment, iteration, stage).frame(table or stage)

    def copy(self, folder: Path) -> Place:
        """The same place elsewhere."""
        shutil.copytree(self.folder, folder)
        return Place(folder)


@dataclass(frozen=True)
class Ran(Place):
    """A place where the toy and its null control were run."""

    output: str
    seconds: float


def new_place(folder: Path) -> Place:
    """A place where nothing was run yet."""
    write_toys(folder / "experiments")
    return Place(folder)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return new_place(tmp_path / "place")


@pytest.fixture(scope="session")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """``textalign run toy``, uninterrupted. To be read only: take a `copy` to change something."""
    place = new_place(tmp_path_factory.mktemp("loop") / "place")
    started = time.monotonic()
    done = place.textalign("run", "toy")
    return Ran(place.folder, done.stdout + done.stderr, time.monotonic() - started)
