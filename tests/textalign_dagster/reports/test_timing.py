"""Time per part by hand: sums, order and what is left out."""

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rich.console import Console

from resources.store import ArtifactStore
from resources.store.attempts import Draft
from textalign_dagster.reports.timing import bottleneck, timing_table, timings
from textalign_dagster.settings import SettingsError

ROWS = [
    {"iteration": 1, "stage": "generations", "part": "load", "seconds": 4.0, "reused": True},
    {"iteration": 1, "stage": "checkpoint", "part": "train", "seconds": 3.0, "reused": False},
    {"iteration": 1, "stage": "checkpoint", "part": "save", "seconds": 0.04, "reused": False},
    {"iteration": 1, "stage": "checkpoint", "part": "rest", "seconds": 0.96, "reused": False},
    {"iteration": 2, "stage": "generations", "part": "load", "seconds": 2.0, "reused": True},
]


def rows() -> list[dict[str, Any]]:
    return [{"experiment": "toy", **row} for row in ROWS]


def test_parts_reused_from_another_experiment_take_no_time() -> None:
    first, second = ([row for row in rows() if row["iteration"] == k] for k in (1, 2))
    assert bottleneck(first) == "checkpoint, train: 75% of 4.0 s"
    assert bottleneck(second) == "all of it was reused from another experiment"


def test_the_table_leaves_out_parts_that_took_no_time() -> None:
    console = Console(width=100, record=True)
    console.print(timing_table(rows()))
    shown = console.export_text()
    cells = [[cell.strip() for cell in line.split("│")[1:-1]] for line in shown.splitlines() if "│" in line]
    assert cells == [
        ["generations", "load", "shared", "shared"],
        ["checkpoint", "train", "3.0", ""],
        ["", "rest", "1.0", ""],
        ["all", "", "4.0", "0.0"],
    ]
    assert "iteration 1: checkpoint, train: 75% of 4.0 s" in shown


def test_parts_are_in_execution_order_and_add_up(tmp_path: Path) -> None:
    store = ArtifactStore(tmp_path)
    schema = pl.Schema({"x": pl.Int64})

    def produce(draft: Draft) -> None:
        draft.write("checkpoints", pl.DataFrame({"x": [1]}, schema), schema)
        draft.record(part_seconds={"train": 1e-9, "save": 2e-9, "load": 3e-9})

    artifact = store.make("checkpoint", "key", produce, inputs={}, settings={})
    store.assign("toy", 1, "checkpoint", artifact, settings={}, checks={})
    parts = timings(store, "toy")
    assert [row["part"] for row in parts] == ["load", "train", "save", "rest"]
    assert sum(row["seconds"] for row in parts) == pytest.approx(artifact.manifest["seconds"])
    with pytest.raises(SettingsError, match="toi has no finished stage yet: textalign run toi"):
        timings(store, "toi")
