"""A store written by an earlier version, before examples had their own table, is read and reused.

`fixtures/store_without_examples.tar.gz` holds the experiment `old` and its null control (two iterations, a policy
of 10,000 weights), with their source files, as the earlier version left them.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import polars as pl
import pytest

from resources.store import ArtifactStore
from resources.views import connect
from tests.toy import environment, textalign

FIXTURE = Path(__file__).parents[1] / "fixtures" / "store_without_examples.tar.gz"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("earlier")
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(folder, filter="data")
    return folder, environment(folder / "home", folder / "experiments")


def artifacts(folder: Path) -> set[str]:
    return {
        f"{path.parent.parent.name}/{path.parent.name}"
        for path in (folder / "home" / "store").rglob("manifest.json")
    }


def test_everything_is_fresh_and_nothing_is_recomputed(place: tuple[Path, dict[str, str]]) -> None:
    folder, env = place
    before = artifacts(folder)
    cells = json.loads(textalign("status", "--json", env=env).stdout)
    assert {cell["experiment"] for cell in cells} == {"old", "old_null"} and len(cells) == 24
    assert {cell["state"] for cell in cells} == {"fresh"}, cells
    # Dagster has no history of it: all stages run, and reuse what exists.
    lines = [
        line.split()
        for line in textalign("run", "old", env=env).stdout.splitlines()
        if line.startswith("old")
    ]
    stages = [line for line in lines if "|" in line[0]]
    assert len(stages) == 24 and {line[2] for line in stages} == {"reused"}, stages
    assert artifacts(folder) == before


def test_tables_can_be_queried(place: tuple[Path, dict[str, str]]) -> None:
    folder, _ = place
    with connect(ArtifactStore(folder / "home" / "store")) as database:

        def count(table: str) -> tuple[int, ...]:
            row = database.execute(f"SELECT count(*) FROM {table} WHERE experiment = 'old'").fetchone()
            return row or (-1,)

        assert [count(table) for table in ("generations", "datapool", "examples")] == [(24,), (36,), (0,)]
        assert count("scores")[0] > 0 and count("lineage") == (2,)


def test_new_iteration_and_retraining_build_on_it(place: tuple[Path, dict[str, str]]) -> None:
    folder, env = place
    path = folder / "experiments" / "old.yaml"
    path.write_text(path.read_text().replace("iterations: 2", "iterations: 3"))
    shown = textalign("run", "old", "--no-control", env=env).stdout
    assert "old|002  up to date" in shown and "8 of 36 rows drawn" in shown
    store = ArtifactStore(folder / "home" / "store")
    third = store.pointer("old", 3, "datapool")
    assert third is not None
    examples, pool = third.artifact.frame("examples"), third.artifact.frame("datapool")
    assert examples["sample_id"].to_list() == pool.filter("drawn")["sample_id"].to_list()
    # Retraining iteration 1 finds a pool without examples, and trains on the same rows.
    path.write_text(path.read_text().replace("learning_rate: 0.001", "learning_rate: 0.002"))
    shown = textalign("run", "old", "-k", "1", "--no-control", env=env).stdout
    assert "2 steps" in shown and shown.count("reused") == 4
    first, trained = store.pointer("old", 1, "datapool"), store.pointer("old", 1, "checkpoint")
    assert first is not None and trained is not None and "examples" not in first.artifact.tables
    rows = pl.read_parquet(trained.artifact.path("job") / "rows.parquet")
    drawn = first.artifact.frame("datapool").filter("drawn")
    assert rows["sample_id"].to_list() == drawn["sample_id"].to_list()
    assert rows["condition"].to_list() == drawn["condition"].to_list() and set(rows["role"]) == {"only"}
