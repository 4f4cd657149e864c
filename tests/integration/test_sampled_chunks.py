"""kill -9 in the middle of sampling: finished chunks are not sampled again."""

from __future__ import annotations

from pathlib import Path

import pytest

from resources.engines.chunks import CHUNK
from tests import forked
from tests.integration.conftest import Place, new_place
from tests.toy import PROJECT
from textalign_dagster.settings import write_yaml

SAMPLING = str(Path(__file__).with_name("sampling_killed.py"))


def place_with_chunks(folder: Path) -> Place:
    """A place with the toy in chunks of up to five: four prompts with three samples each give 3, 3, 3 and 3."""
    place = new_place(folder)
    content = {"extends": "toy", "control": None, "sampling": {"chunk": 5}}
    (place.experiments / "chunked.yaml").write_text(write_yaml(content), encoding="utf-8")
    return place


def sample(place: Place, *, dies_in: int = 0) -> list[int]:
    """The number of completions requested, per call to the engine; call ``dies_in`` kills the process."""
    log = place.folder / "calls"
    log.unlink(missing_ok=True)
    arguments = [str(log), str(dies_in), "chunked|001"]
    done = forked.run((str(SAMPLING),), arguments, env=place.env, cwd=PROJECT, text="", timeout=120)
    assert done.returncode == (-9 if dies_in else 0), done.stdout + done.stderr
    return list(map(int, log.read_text().split()))


def chunks(place: Place) -> list[str]:
    """The keys of the stored chunks."""
    return sorted(p.parent.name for p in (place.home / "store").glob(f"artifacts/{CHUNK}/*/manifest.json"))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = place_with_chunks(tmp_path_factory.mktemp("whole") / "place")
    assert sample(place) == [3] * 4
    return place


def test_killed_process_loses_one_chunk(uninterrupted: Place, tmp_path: Path) -> None:
    place = place_with_chunks(tmp_path / "place")
    assert sample(place, dies_in=2) == [3, 3]
    assert len(chunks(place)) == 1
    assert place.store.pointer("chunked", 1, "generations") is None  # no cell points at a chunk

    assert sample(place) == [3] * 3  # the first is reused, the second is sampled again
    assert chunks(place) == []
    mine, theirs = (p.artifact("chunked", 1, "generations") for p in (place, uninterrupted))
    assert mine.key == theirs.key
    assert mine.tables["generations"]["sha256"] == theirs.tables["generations"]["sha256"]
    facts, other = mine.manifest["facts"], theirs.manifest["facts"]
    assert (facts["found_samples"], other["found_samples"]) == (3, 0)
    assert facts["chunks"] == other["chunks"] and len(facts["chunks"]) == 4
    assert set(facts["part_seconds"]) == {"load", "generate"} and min(facts["part_seconds"].values()) > 0
