"""Shared by the exports: joining rows, reporting what was left out and why, and writing the file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    Attributes:
        rows: rows (or records) in the file.
        left_out: reason → number of judgements that the format cannot hold.
    """

    rows: int
    left_out: dict[str, int]

    def summary(self) -> str:
        """How many rows were written and left out, with reasons."""
        lines = [f"{self.rows:,} rows written; left out: {sum(self.left_out.values()):,}"]
        return "\n".join([*lines, *(f"  {count:,} × {reason}" for reason, count in self.left_out.items())])


def judged_samples(samples: pl.DataFrame, feedback: pl.DataFrame) -> list[dict[str, Any]]:
    """Feedback rows with their sample's prompt and text (as ``response``), in the order of the feedback.

    Args:
        samples: sample_id, prompt, text.
        feedback: rows of FEEDBACK.

    Raises:
        ValueError: a row refers to a sample that is not among them.
    """
    if "reference" not in samples.columns:
        samples = samples.with_columns(reference=pl.lit(None, dtype=pl.String))
    texts = samples.select("sample_id", "prompt", "reference", response="text")
    joined = feedback.join(texts, on="sample_id", how="left", maintain_order="left")
    unknown = joined.filter(pl.col("prompt").is_null())
    if unknown.height:
        raise ValueError(f"feedback of sample {unknown['sample_id'][0]}, which is not among the samples")
    return joined.to_dicts()


def compared_samples(
    samples: pl.DataFrame, pairs: pl.DataFrame
) -> Iterator[tuple[dict[str, Any], str, str, str]]:
    """Rows of PAIRS, each with its prompt and the texts of sample_a and sample_b.

    Args:
        samples: sample_id, prompt, text.
    """
    known = {
        i: (prompt, text) for i, prompt, text in samples.select("sample_id", "prompt", "text").iter_rows()
    }
    for pair in pairs.iter_rows(named=True):
        (prompt, a), (_, b) = known[pair["sample_a"]], known[pair["sample_b"]]
        yield pair, prompt, a, b


def one_aspect(feedback: pl.DataFrame, kinds: tuple[str, ...], what: str) -> str | None:
    """The kind of the feedback (None without rows), if all rows share one aspect and one allowed kind.

    Raises:
        ValueError: otherwise; the file format holds only one.
    """
    found = feedback.select("aspect", "kind").unique().rows()
    if len(found) > 1:
        raise ValueError(
            f"{what} files hold one aspect; found {', '.join(sorted({a for a, _ in found}))}; filter first"
        )
    if found and found[0][1] not in kinds:
        raise ValueError(f"{what} files hold {', '.join(kinds)}; this is {found[0][1]}")
    return found[0][1] if found else None


def write_file(path: Path, content: str | bytes) -> None:
    """Writes the file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    temporary.replace(path)


def exported(rows: int, left_out: Counter[str]) -> Exported:
    """The report, most frequent reason first."""
    return Exported(rows, dict(left_out.most_common()))
