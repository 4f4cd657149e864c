"""The grid as a table: the state of every stage of every iteration, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from resources.freshness import Freshness
from resources.store import ArtifactError, ArtifactStore
from textalign_dagster.experiment_files import Library
from textalign_dagster.settings import SettingsError
from textalign_dagster.stages import STAGES

SIGNS = {"fresh": "green", "stale": "yellow", "blocked": "red", "missing": "dim", "unreadable": "red"}


def grid(store: ArtifactStore, library: Library, names: Sequence[str]) -> list[dict[str, Any]]:
    """One row per experiment, iteration and stage: state, reason, seconds, reused."""
    rows = []
    for name in names:
        experiment = library.load(name)
        freshness = Freshness(store, name, experiment)
        for k in range(1, experiment.iterations + 1):
            for stage in STAGES:
                row: dict[str, Any] = {"experiment": name, "iteration": k, "stage": stage}
                try:
                    state = freshness.state(k, stage)
                    pointer = freshness.pointer(k, stage)
                except (ArtifactError, SettingsError) as error:
                    rows.append({**row, "state": "unreadable", "reason": str(error)})
                    continue
                row |= {"state": state.kind, "reason": state.reason}
                if pointer is not None:
                    seconds = pointer.artifact.manifest["seconds"]
                    row |= {"seconds": seconds, "reused": pointer.reused}
                rows.append(row)
    return rows


def grid_table(cells: Sequence[dict[str, Any]]) -> Table:
    """The grid for people: an iteration a row, a stage a column, seconds in the cells."""
    table = Table(pad_edge=False)
    table.add_column("experiment")
    table.add_column("iteration", justify="right")
    for stage in STAGES:
        table.add_column(stage, justify="right")
    table.add_column("seconds", justify="right")
    reasons: dict[str, None] = {}
    before = ""
    for start in range(0, len(cells), len(STAGES)):
        row = cells[start : start + len(STAGES)]
        name = row[0]["experiment"]
        if name != before:
            table.add_section()
        shown = [_cell(cell) for cell in row]
        spent = sum(cell.get("seconds", 0.0) for cell in row if not cell.get("reused"))
        table.add_row(name if name != before else "", str(row[0]["iteration"]), *shown, f"{spent:.1f}")
        before = name
        for cell in row:
            if cell["state"] in ("stale", "blocked", "unreadable"):
                reasons[cell["reason"]] = None
    table.caption = escape("\n".join(reasons)) or None
    table.caption_justify = "left"
    return table


def _cell(cell: dict[str, Any]) -> str:
    colour, state = SIGNS[cell["state"]], cell["state"]
    if state == "missing":
        return f"[{colour}]-[/]"
    took = "shared" if cell.get("reused") else f"{cell.get('seconds', 0.0):.1f}"
    return f"[{colour}]{took}[/]" if state == "fresh" else f"[{colour}]{state}[/]"
