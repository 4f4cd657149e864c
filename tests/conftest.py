"""What the tests share: a home of their own, and the toy experiments."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.toy import environment, write_toys

LONG = ("integration", "training", "resources")
"""Folders with the files that take longest."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first: of several processes none is then left with one at the end."""
    here = Path(__file__).parent

    def length(item: pytest.Item) -> int:
        folder = item.path.relative_to(here).parts[0]
        return LONG.index(folder) if folder in LONG else len(LONG)

    items.sort(key=length)


gc.disable()  # until all is imported


def pytest_collection_finish() -> None:
    """Every training collects garbage twice, and need not look through all that was imported."""
    gc.freeze()
    gc.enable()


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """Training in this process, forked workers: for tests of what they compute, not of how they start."""
    from tests.integration.quick import REPLACED

    with pytest.MonkeyPatch.context() as patch:
        for owner, name, value in REPLACED:
            patch.setattr(owner, name, value)
        yield


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home; nothing of the surroundings shows in this process."""
    for name in [name for name in os.environ if name.startswith(("TEXTALIGN_", "DAGSTER_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("TEXTALIGN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def toys(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the toy experiments, which this process knows beside the shipped ones."""
    folder = write_toys(tmp_path / "experiments")
    monkeypatch.setenv("TEXTALIGN_EXPERIMENTS", environment(home, folder)["TEXTALIGN_EXPERIMENTS"])
    return folder
