"""The score table of an experiment, alongside iteration 0 and its null control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import polars as pl
from rich.console import Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from resources.store import ArtifactStore
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.files import Library
from textalign_dagster.reports.score_table import LM_EVAL_SUBJECT, RED_TEAM_SUBJECT, titles
from textalign_dagster.tables import SCORES

GUARD_NOTE = (
    "Below each value is its 95 % interval from resampling prompts; it does not cover variation between seeds. "
    "The null control trains on its own samples without feedback: what improves there too is not a gain from feedback."
)


NARROWEST = 11
"""Minimum width of a column in characters: that of an interval."""


def score_rows(store: ArtifactStore, library: Library, name: str) -> pl.DataFrame:
    """The scores of an experiment, of its baselines (with iteration 0) and of its null control.

    Returns:
        One row per experiment, iteration, subject, role, condition and metric, with value, lo, hi, n; in
        that order. Iterations that were not evaluated are missing.
    """
    control = library.control_of(name)
    frames = []
    for experiment in filter(None, (name, control)):
        for k in range(library.load(experiment).iterations + 1):
            pointer = store.pointer(experiment, k, "evaluation")
            # All experiments of one policy share iteration 0: it is shown once.
            if pointer is None or (k == 0 and experiment != name):
                continue
            frames.append(placed(pointer.artifact.frame("scores"), experiment, k))
    if not frames:
        return placed(SCORES.to_frame(), name, 0)
    return pl.concat(frames)


def placed(scores: pl.DataFrame, experiment: str, iteration: int) -> pl.DataFrame:
    """A score table with columns for the cell it belongs to."""
    cell = (pl.lit(experiment).alias("experiment"), pl.lit(iteration).alias("iteration"))
    # Older tables have no baselines.
    subject = (
        pl.col("subject") if "subject" in scores.columns else pl.lit(None, dtype=pl.String).alias("subject")
    )
    return scores.select(*cell, subject, "role", "condition", "metric", "value", "lo", "hi", "n")


def score_table(rows: pl.DataFrame, experiment: Experiment, name: str, width: int = 120) -> Group:
    """The table for people: one row per policy and condition, one column per metric; in parts if it is too wide."""
    harness = rows.filter(subject=LM_EVAL_SUBJECT)["metric"].unique(maintain_order=True)
    named = {**titles(experiment), **{metric: metric for metric in harness}}
    metrics = [metric for metric in named if metric in set(rows["metric"])]
    values = {m: rows.filter(pl.col("metric") == m)["value"] for m in metrics}
    constant = {m for m, found in values.items() if found.n_unique() == 1 < found.len()}
    last = rows.filter(pl.col("experiment") == name)["iteration"].max()
    lines = [
        _line(rows, row, name)
        for row in _policies(rows, name)
        # The stored tables have the probes of all iterations; here, the last one's are enough.
        if row["role"] not in ("probe", "scenario")
        or row["iteration"] in ({last} if row["role"] == "probe" else {0, last})
    ]
    shown = {metric: named[metric] for metric in metrics if metric not in constant}
    tables = [_part(part, lines) for part in _parts(shown, lines, width)]
    tables[0].title = escape(f"{name}: {experiment.description}")
    fixed = [f"{named[m]} is {values[m][0]:g} throughout." for m in constant]
    return Group(*tables, Text(" ".join([GUARD_NOTE, *fixed]), style="table.caption"))


@dataclass(frozen=True)
class _Line:
    """A row of the table: its label, its section, and metric → cell."""

    label: str
    section: tuple[Any, ...]
    cells: dict[str, str]


def _line(rows: pl.DataFrame, row: dict[str, Any], name: str) -> _Line:
    own = rows.filter(*(pl.col(column).eq_missing(value) for column, value in row.items()))
    found = own.select("metric", "value", "lo", "hi").iter_rows()
    probe = row["condition"] if row["role"] == "probe" else None
    section = (row["experiment"], row["role"] in ("baseline", "scenario") and row["role"], probe)
    return _Line(_label(row, name), section, {m: _cell(v, lo, hi) for m, v, lo, hi in found})


def _parts(titled: dict[str, str], lines: Sequence[_Line], width: int) -> list[dict[str, str]]:
    """The metrics, in order, split into as few tables as the width allows."""
    edges = 3  # of a column: its border and padding
    left = width - edges - max((len(text) for line in lines for text in line.label.split("\n")), default=0)
    parts: list[dict[str, str]] = [{}]
    room = left
    for metric, title in titled.items():
        texts = [*title.split(), *(t for line in lines for t in line.cells.get(metric, "").split("\n"))]
        wide = edges + max(NARROWEST, *map(len, texts))
        if wide > room and parts[-1]:
            parts.append({})
            room = left
        parts[-1][metric] = title
        room -= wide
    return parts


def _part(titled: dict[str, str], lines: Sequence[_Line]) -> Table:
    table = Table(title_justify="left", pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for title in titled.values():
        table.add_column(escape(title), justify="right", min_width=NARROWEST)
    for before, line in zip([None, *lines], lines, strict=False):
        if before is not None and line.section != before.section:
            table.add_section()
        table.add_row(line.label, *(line.cells.get(metric, "") for metric in titled))
    return table


def _policies(rows: pl.DataFrame, name: str) -> Sequence[dict[str, Any]]:
    """(experiment, iteration, subject, role, condition): its own first, then control, probes, scenarios, baselines."""
    found = rows.select("experiment", "iteration", "subject", "role", "condition").unique(maintain_order=True)
    return found.sort(
        pl.col("role") == "baseline",
        pl.col("role") == "scenario",
        (pl.col("role") == "probe") & (pl.col("experiment") == name),
        pl.col("experiment") != name,
        "iteration",
        maintain_order=True,
    ).to_dicts()


def _label(row: dict[str, Any], name: str) -> str:
    if row["role"] == "probe":
        condition = str(row["condition"])
        condition = condition if len(condition) <= 25 else condition[:24] + "…"
        return f"iteration {row['iteration']}, conditioned on\n“{escape(condition)}”"
    who = "" if row["experiment"] == name else "null control, "
    if row["role"] == "scenario":
        how = "" if row["subject"] in (RED_TEAM_SUBJECT, LM_EVAL_SUBJECT) else "scenario "
        return f"{who}iteration {row['iteration']},\n{how}{escape(str(row['subject']))}"
    if row["role"] == "baseline":
        return f"baseline {escape(str(row['subject']))}"
    if row["iteration"] == 0:
        return "iteration 0 (base policy)"
    return f"{who}iteration {row['iteration']}"


def _cell(value: float, lo: float | None, hi: float | None) -> str:
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1
    if lo is None or hi is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f}\n{lo:.{digits}f}–{hi:.{digits}f}"
