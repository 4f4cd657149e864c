"""The curves of a run: each metric over the iterations, alongside the null control."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from textalign_dagster.experiment import Experiment
from textalign_dagster.reports.score_table import OBEDIENCE, titles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHOD, CONTROL, PROBE = "#2563eb", "#9ca3af", "#dc2626"


def curves(rows: pl.DataFrame, experiment: Experiment, name: str, panels: int | None = None) -> Figure:
    """A panel per metric: the experiment, its null control and its probes, with 95 % intervals.

    Args:
        rows: as :func:`textalign_dagster.reports.report.score_rows` returns them.
        panels: how many metrics to show at most, the first ones.
    """
    from matplotlib.figure import Figure  # takes 0.5 s: imported only to draw
    from matplotlib.ticker import MaxNLocator

    rows = rows.filter(~pl.col("role").is_in(["baseline", "scenario"]) & (pl.col("metric") != OBEDIENCE))
    named = titles(experiment)
    metrics = [m for m in named if rows.filter(pl.col("metric") == m)["value"].n_unique() > 1][:panels]
    across = min(3, len(metrics)) or 1
    down = max(1, -(-len(metrics) // across))
    figure = Figure(figsize=(4.2 * across, 3.1 * down + 0.5), layout="constrained")
    start = rows.filter(pl.col("iteration") == 0)
    for place, metric in enumerate(metrics, start=1):
        axes = figure.add_subplot(down, across, place)
        of_metric = rows.filter(pl.col("metric") == metric)
        for (series, role, condition), line in of_metric.filter(pl.col("iteration") > 0).group_by(
            "experiment", "role", "condition", maintain_order=True
        ):
            own = series == name
            if role == "probe":
                colour, label = PROBE, f"conditioned on “{str(condition)[:24]}…”"
            else:
                colour, label = (METHOD, name) if own else (CONTROL, f"{series} (null control)")
            with_start = pl.concat([start.filter(pl.col("metric") == metric), line]).sort("iteration")
            x, y = with_start["iteration"], with_start["value"]
            style = "--" if role == "probe" else "-"
            axes.plot(x, y, style, color=colour, marker="o", markersize=4, label=label)
            axes.fill_between(x, with_start["lo"], with_start["hi"], color=colour, alpha=0.15, linewidth=0)
        axes.set_title(named[metric], fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlabel("iteration", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.25)
        lowest, highest = of_metric.select(
            pl.min_horizontal("value", "lo").min(), pl.max_horizontal("value", "hi").max().alias("highest")
        ).row(0)
        axes.set_ylim(1.06 * min(0.0, lowest), 1.06 * max(0.0, highest))  # rewards can be negative
        axes.spines[["top", "right"]].set_visible(False)
    if figure.axes:
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    return figure


def save_curves(figure: Figure, path: Path) -> Path:
    """Writes the figure (format by suffix) and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}")
    figure.savefig(temporary, format=path.suffix[1:], dpi=130)
    temporary.replace(path)
    return path


def as_markdown(figure: Figure) -> str:
    """The figure as a Markdown image with embedded data, for the Dagster UI."""
    import base64

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=80)
    return f"![curves](data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()})"
