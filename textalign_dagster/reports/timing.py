"""Where the time of an iteration went: seconds by stage and part, and what took longest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from resources.store import ArtifactStore
from textalign_dagster.loop.stages import STAGES
from textalign_dagster.settings import SettingsError

REST = "rest"
"""The time of a stage outside its named parts: reading its inputs, starting processes, writing to the store."""


SHORT = 0.05
"""Seconds below which a part is left out of the table; a stage with no longer part shows `REST`."""


def timings(store: ArtifactStore, name: str) -> list[dict[str, Any]]:
    """One row per iteration, stage and part: experiment, iteration, stage, part, seconds, reused.

    Parts are what the stages measured themselves (load, generate, wait, score, train, save, …); the
    remaining time of a stage is `REST`. Output computed for another cell is reused: it took no time here.

    Raises:
        SettingsError: the experiment has no finished stage yet.
    """
    rows = []
    for k in sorted(store.cells().filter(experiment=name)["iteration"].unique()):
        for stage in STAGES:
            pointer = store.pointer(name, k, stage)
            if pointer is None:
                continue
            manifest = pointer.artifact.manifest
            named = manifest["facts"].get("part_seconds", {})
            parts = {part: float(named[part]) for part in sorted(named, key=_order)}
            parts[REST] = max(0.0, float(manifest["seconds"]) - sum(parts.values()))
            rows += [
                {
                    "experiment": name,
                    "iteration": k,
                    "stage": stage,
                    "part": part,
                    "seconds": took,
                    "reused": pointer.reused,
                }
                for part, took in parts.items()
            ]
    if not rows:
        raise SettingsError(f"{name} has no finished stage yet: textalign run {name}")
    return rows


def _order(part: str) -> tuple[int, str]:
    """Manifests keep no order: loading comes first, saving last."""
    return {"load": 0, "sampling": 1, "fluency": 2, "save": 4}.get(part, 3), part


def bottleneck(rows: Sequence[dict[str, Any]]) -> str:
    """The part that took longest in one iteration's rows, in words."""
    own = [row for row in rows if not row["reused"]]
    total = sum(row["seconds"] for row in own)
    if total == 0:
        return "all of it was reused from another experiment"
    most = max(own, key=lambda row: row["seconds"])
    return f"{most['stage']}, {most['part']}: {most['seconds'] / total:.0%} of {total:.1f} s"


def timing_table(rows: Sequence[dict[str, Any]]) -> Table:
    """The table for people: one row per part, one column per iteration; below, what took longest."""
    iterations = sorted({row["iteration"] for row in rows})
    table = Table(pad_edge=False, title=rows[0]["experiment"], title_justify="left")
    table.add_column("stage")
    table.add_column("part")
    for k in iterations:
        table.add_column(f"iteration {k}", justify="right")
    took = {(row["stage"], row["part"], row["iteration"]): row for row in rows}
    for stage in STAGES:
        own = [row for row in rows if row["stage"] == stage]
        if not own:
            continue
        table.add_section()
        shown = stage
        parts = dict.fromkeys(row["part"] for row in own if row["seconds"] >= SHORT)
        for part in parts or [REST]:
            table.add_row(shown, part, *(_cell(took.get((stage, part, k))) for k in iterations))
            shown = ""
    table.add_section()
    sums = (
        sum(row["seconds"] for row in rows if row["iteration"] == k and not row["reused"]) for k in iterations
    )
    table.add_row("all", "", *(f"{total:.1f}" for total in sums))
    longest = (
        f"iteration {k}: {bottleneck([row for row in rows if row['iteration'] == k])}" for k in iterations
    )
    table.caption = escape("Longest:\n" + "\n".join(longest))
    table.caption_justify = "left"
    return table


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    return "shared" if row["reused"] else f"{row['seconds']:.1f}"
