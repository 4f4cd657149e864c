"""The grid as a table: the state of every stage of every iteration, and the seconds it took."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rich.markup import escape
from rich.table import Table

from resources.freshness import Freshness
from resources.store import ArtifactError, ArtifactStore
from textalign_dagster.experiment.files import Library
from textalign_dagster.loop.stages import STAGES
from textalign_dagster.settings import SettingsError

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
    """The grid for people: one row per iteration, one column per stage, seconds in the cells.

    Iterations that have not been started share a row.
    """
    table = Table(pad_edge=False)
    table.add_column("experiment", no_wrap=True, overflow="ignore")
    table.add_column("iteration", justify="right")
    for stage in STAGES:
        table.add_column(stage, justify="right")
    table.add_column("seconds", justify="right")
    reasons: dict[str, None] = {}
    rows = [cells[start : start + len(STAGES)] for start in range(0, len(cells), len(STAGES))]
    for name, own in groupby(rows, key=lambda row: row[0]["experiment"]):
        table.add_section()
        shown_name = name
        for alike, several in groupby(own, key=_untouched):
            block = list(several)
            for row in block[:1] if alike else block:
                first, last = row[0]["iteration"], block[-1][0]["iteration"]
                which = f"{first}–{last}" if alike and first < last else str(first)
                spent = sum(cell.get("seconds", 0.0) for cell in row if not cell.get("reused"))
                table.add_row(shown_name, which, *map(_cell, row), f"{spent:.1f}")
                shown_name = ""
                for cell in row:
                    if cell["state"] in ("stale", "blocked", "unreadable"):
                        reasons[cell["reason"]] = None
    table.caption = escape("\n".join(reasons)) or None
    table.caption_justify = "left"
    return table


def _untouched(row: Sequence[dict[str, Any]]) -> bool:
    """Whether an iteration has no artifacts: such iterations share one row."""
    return all(cell["state"] == "missing" for cell in row)


def _cell(cell: dict[str, Any]) -> str:
    colour, state = SIGNS[cell["state"]], cell["state"]
    if state == "missing":
        return f"[{colour}]-[/]"
    took = "shared" if cell.get("reused") else f"{cell.get('seconds', 0.0):.1f}"
    return f"[{colour}]{took}[/]" if state == "fresh" else f"[{colour}]{state}[/]"
