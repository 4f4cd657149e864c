"""One whole run of the toy loop, made once, read by many tests and copied by those that change it."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from resources.store import Artifact, ArtifactStore
from tests.rule_judge import rule_judge
from tests.toy import ToyModels, environment, textalign, write_toys
from tests.toy_models import save_toy_models


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
    """``textalign run toy``, uninterrupted, its trainings in its own process. To be read only: take a `copy` to change something.

    Of several test processes one makes it, and the others wait for it.
    """
    session = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    shared = None if session is None else tmp_path_factory.getbasetemp().parent / f"ran-{session}"
    folder = shared or tmp_path_factory.mktemp("loop")
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        told = folder / "told.json"
        if not told.is_file():
            place, started = new_place(folder / "place"), time.monotonic()
            done = place.textalign("run", "toy")
            told.write_text(json.dumps([done.stdout + done.stderr, time.monotonic() - started]))
        output, seconds = json.loads(told.read_text())
    return Ran(folder / "place", output, seconds)


@pytest.fixture(scope="session")
def toy_models(tmp_path_factory: pytest.TempPathFactory) -> ToyModels:
    """What stands for the hub's models."""
    return save_toy_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def judge_url() -> Iterator[str]:
    """An LLM judge that answers by rule."""
    with rule_judge() as url:
        yield url


@pytest.fixture(scope="module")
def s3_endpoint() -> Iterator[str]:
    """The URL of an S3 server (moto) in a process of its own."""
    pytest.importorskip("moto.server", reason="needs moto[server]")
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert server.stdout is not None
    lines = iter(server.stdout.readline, "")
    found = next((m for line in lines if (m := re.search(r"http://127\.0\.0\.1:\d+", line))), None)
    assert found, "moto's server did not start"
    drain = threading.Thread(target=lambda: [None for _ in lines], daemon=True)
    drain.start()  # an unread pipe would stop the server
    yield found.group()
    server.terminate()
    server.wait()
    drain.join()
    server.stdout.close()


def s3_environment(endpoint: str) -> dict[str, str]:
    """What object stores' clients read, for that server."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "access-of-a-test",
        "AWS_SECRET_ACCESS_KEY": "secret-of-a-test",
        "AWS_REGION": "us-east-1",
    }
