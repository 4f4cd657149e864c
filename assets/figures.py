"""Metadata for people to read: rounded numbers, tables, samples verbatim.

The UI renders Markdown without HTML, so a table cannot have line breaks; samples are shown
in fenced blocks instead.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import dagster as dg
import polars as pl


def figure(value: float, digits: int = 4) -> float | str:
    """The value with ``digits`` significant digits; larger ones are rounded to whole numbers.

    Infinity and NaN become text: they are not valid JSON, and the UI could not load the page.
    """
    if not math.isfinite(value):
        return str(value)
    return float(f"{value:.{digits}g}") if abs(value) < 10**digits else float(round(value))


def markdown_table(frame: pl.DataFrame, width: int = 60) -> dg.MarkdownMetadataValue:
    """The rows as a Markdown table; texts on one line, long ones truncated."""

    def cell(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            return f"{value:,.3g}" if abs(value) < 1000 else f"{value:,.0f}"
        if isinstance(value, int) and not isinstance(value, bool):
            return f"{value:,}"
        text = " ".join(str(value).split())
        text = text if len(text) <= width else text[: width - 1] + "…"
        return re.sub(r"([\\|`*_<>\[\]])", r"\\\1", text)

    lines = ["| " + " | ".join(frame.columns) + " |", "|" + " --- |" * frame.width]
    lines += ["| " + " | ".join(map(cell, row)) + " |" for row in frame.iter_rows()]
    return dg.MetadataValue.md("\n".join(lines))


def sample_blocks(rows: Iterable[Mapping[str, Any]], width: int = 800) -> dg.MarkdownMetadataValue:
    """Samples verbatim, each below its other fields.

    Args:
        rows: ``prompt`` and ``text``, shown as one text; every other field is a line above it.
        width: characters of a prompt or text that are shown.
    """
    parts = []
    for number, row in enumerate(rows, start=1):
        written = _cut(str(row["prompt"]), width) + _cut(str(row.get("text") or ""), width)
        fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", written)), default=0))
        fields = [f"{name}: {_inline(v)}" for name, v in row.items() if name not in ("prompt", "text")]
        parts += [f"**{number}**  " + " · ".join(fields), f"{fence}\n{written}\n{fence}"]
    return dg.MetadataValue.md("\n\n".join(parts))


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[:width] + "…"


def _inline(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.3g}"
    return re.sub(r"([\\`*_<>\[\]])", r"\\\1", " ".join(str(value).split()))
