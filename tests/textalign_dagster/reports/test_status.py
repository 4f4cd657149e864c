"""The grid: one row per stage, and a table that shows why a stage is not fresh."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from resources.store import ArtifactStore
from textalign_dagster.experiment.files import Library
from textalign_dagster.loop.stages import STAGES
from textalign_dagster.reports.status import grid, grid_table


def table(cells: list[dict[str, object]]) -> str:
    out = io.StringIO()
    Console(file=out, width=140).print(grid_table(cells))
    return out.getvalue()


def test_all_cells_of_an_empty_store_are_missing(tmp_path: Path, toys: Path) -> None:
    cells = grid(ArtifactStore(tmp_path / "store"), Library.default(), ["toy", "toy_null"])
    assert len(cells) == 2 * 2 * len(STAGES)
    assert {cell["state"] for cell in cells} == {"missing"}
    text = table(cells)
    assert text.count("toy_null") == 1
    for stage in STAGES:
        assert stage in text


def test_an_unreadable_cell_does_not_hide_the_others(tmp_path: Path, toys: Path) -> None:
    store = ArtifactStore(tmp_path / "store")
    broken = tmp_path / "store" / "cells" / "toy" / "001" / "feedback.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    cells = grid(store, Library.default(), ["toy"])
    states = {(cell["iteration"], cell["stage"]): cell["state"] for cell in cells}
    assert states[1, "feedback"] == "unreadable"
    assert states[1, "generations"] == "missing"
    assert "is not readable JSON" in " ".join(table(cells).split())


def test_no_experiments(tmp_path: Path) -> None:
    assert grid(ArtifactStore(tmp_path), Library(()), []) == []
    table([])
