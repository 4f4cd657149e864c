"""What a run comes to: the score table of an experiment beside iteration 0 and its null control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import polars as pl
from rich.markup import escape
from rich.table import Table

from resources.store import ArtifactStore
from textalign_dagster.evaluation import titles
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment_files import Library
from textalign_dagster.tables import SCORES

GUARD_NOTE = (
    "Below each value its 95 % interval, from resampling prompts; the luck of a training seed is not in it. "
    "The null control trains on its own samples without any feedback: what falls there too is no gain from feedback."
)


def score_rows(store: ArtifactStore, library: Library, name: str) -> pl.DataFrame:
    """The scores of an experiment and of its null control.

    Returns:
        One row per experiment, iteration, role, condition and metric, with value, lo, hi, n; in that
        order. Iterations that were not evaluated are missing.
    """
    control = library.control_of(name)
    frames = []
    for experiment in filter(None, (name, control)):
        for k in range(library.load(experiment).iterations + 1):
            pointer = store.pointer(experiment, k, "evaluation")
            # Iteration 0 is one policy, whoever's: it is shown once.
            if pointer is None or (k == 0 and experiment != name):
                continue
            frames.append(placed(pointer.artifact.frame("scores"), experiment, k))
    if not frames:
        return placed(SCORES.to_frame(), name, 0)
    return pl.concat(frames)


def placed(scores: pl.DataFrame, experiment: str, iteration: int) -> pl.DataFrame:
    """A score table with the cell it belongs to."""
    cell = (pl.lit(experiment).alias("experiment"), pl.lit(iteration).alias("iteration"))
    return scores.select(*cell, "role", "condition", "metric", "value", "lo", "hi", "n")


def score_table(rows: pl.DataFrame, experiment: Experiment, name: str) -> Table:
    """The table people read: one row a policy and condition, one column a metric."""
    named = titles(experiment.task.measures)
    metrics = [metric for metric in named if metric in set(rows["metric"])]
    constant = {m for m in metrics if rows.filter(pl.col("metric") == m)["value"].n_unique() == 1}
    shown = [metric for metric in metrics if metric not in constant]
    table = Table(title=escape(f"{name}: {experiment.description}"), title_justify="left", pad_edge=False)
    table.add_column("policy", no_wrap=True)
    for metric in shown:
        table.add_column(named[metric], justify="right", min_width=11)
    last = rows.filter(pl.col("experiment") == name)["iteration"].max()
    before = ""
    for row in _policies(rows, name):
        if row["role"] == "probe" and row["iteration"] != last:
            continue  # every iteration's probes are in the tables; here the last one's tell enough
        if row["experiment"] != before or row["role"] == "probe":
            table.add_section()
        before = row["experiment"]
        values = rows.filter(
            (pl.col("experiment") == row["experiment"])
            & (pl.col("iteration") == row["iteration"])
            & pl.col("condition").eq_missing(row["condition"])
        )
        cells = {
            m: _cell(v, lo, hi) for m, v, lo, hi in values.select("metric", "value", "lo", "hi").iter_rows()
        }
        table.add_row(_label(row, name), *(cells.get(metric, "") for metric in shown))
    fixed = [
        f"{named[m]} is {rows.filter(pl.col('metric') == m)['value'][0]:g} throughout." for m in constant
    ]
    table.caption = " ".join([GUARD_NOTE, *fixed])
    table.caption_justify = "left"
    return table


def _policies(rows: pl.DataFrame, name: str) -> Sequence[dict[str, Any]]:
    """(experiment, iteration, role, condition), the experiment's own first, then control, then probes."""
    found = rows.select("experiment", "iteration", "role", "condition").unique(maintain_order=True)
    return found.sort(
        (pl.col("role") == "probe") & (pl.col("experiment") == name),
        pl.col("experiment") != name,
        "iteration",
        maintain_order=True,
    ).to_dicts()


def _label(row: dict[str, Any], name: str) -> str:
    if row["role"] == "probe":
        asked = str(row["condition"])
        asked = asked if len(asked) <= 25 else asked[:24] + "…"
        return f"iteration {row['iteration']}, asked for\n“{escape(asked)}”"
    if row["iteration"] == 0:
        return "iteration 0 (base policy)"
    return (
        f"iteration {row['iteration']}"
        if row["experiment"] == name
        else f"null control, iteration {row['iteration']}"
    )


def _cell(value: float, lo: float | None, hi: float | None) -> str:
    digits = 3 if abs(value) < 1 else 2 if abs(value) < 10 else 1
    if lo is None or hi is None:
        return f"{value:.{digits}f}"
    return f"{value:.{digits}f}\n{lo:.{digits}f}–{hi:.{digits}f}"
