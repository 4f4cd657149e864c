"""Importing feedback collected elsewhere and exporting ours: one registry of file formats.

Everything in a file ends up in one of three places: a row, a row with a status other than ok, or
the list of refused rows with line and reason. Nothing is dropped silently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from textalign_dagster.feedback_files.alt import read_alt, write_alt
from textalign_dagster.feedback_files.critiques import read_critiques, read_shepherd
from textalign_dagster.feedback_files.cut import read_cut, write_cut
from textalign_dagster.feedback_files.exported import Exported
from textalign_dagster.feedback_files.imported import Imported
from textalign_dagster.feedback_files.plain import read_plain, write_plain
from textalign_dagster.feedback_files.preferences import read_preferences, write_preferences
from textalign_dagster.feedback_files.sparse_feedback import (
    read_sparse_rankings,
    read_sparse_ratings,
    write_sparse_rankings,
    write_sparse_ratings,
)
from textalign_dagster.judging.pairs import PAIRS
from textalign_dagster.settings import SettingsError, nearest

Write = Callable[[Path, pl.DataFrame, pl.DataFrame, pl.DataFrame], Exported]


@dataclass(frozen=True)
class Format:
    """A file format: what it holds, and how it is read and written."""

    description: str
    read: Callable[..., Imported]
    write: Write | None = None  # None: read-only


FORMATS = {
    "alt": Format(
        "ALT: JSON Lines, a prompt with its generations and rewards, or feedbacks and scores",
        read_alt,
        lambda path, samples, feedback, pairs: write_alt(path, samples, feedback),
    ),
    "cut": Format(
        "CUT and Alpaca: a JSON list of instruction, input, output, judgment",
        read_cut,
        lambda path, samples, feedback, pairs: write_cut(path, samples, feedback),
    ),
    "critiques": Format(
        "OpenAI's critiques of summaries: JSON Lines of passages and questions", read_critiques
    ),
    "shepherd": Format("Shepherd: JSON Lines of question, answer, feedback", read_shepherd),
    "sparse_ratings": Format(
        "sparse_feedback: CSV of instruction, input, response, score",
        read_sparse_ratings,
        lambda path, samples, feedback, pairs: write_sparse_ratings(path, samples, feedback),
    ),
    "sparse_rankings": Format(
        "sparse_feedback: CSV of instruction, input, response1, response2, feedback",
        read_sparse_rankings,
        lambda path, samples, feedback, pairs: write_sparse_rankings(path, samples, pairs),
    ),
    "preferences": Format(
        "preferences and labels in the columns of TRL, HH, SHP, UltraFeedback or HALOs",
        read_preferences,
        lambda path, samples, feedback, pairs: write_preferences(path, samples, pairs),
    ),
    "plain": Format(
        "one judgement per row, .jsonl or .parquet: prompt, response, and value, label or feedback",
        read_plain,
        write_plain,
    ),
}
"""Name → format."""


def read_feedback(path: Path, format_name: str, **options: Any) -> Imported:
    """Reads a file.

    Args:
        options: passed to the format's reader, e.g. ``aspect``.

    Raises:
        SettingsError: unknown format, or a file that cannot be read at all.
    """
    return _format(format_name).read(path, **options)


def write_feedback(
    path: Path,
    format_name: str,
    samples: pl.DataFrame,
    feedback: pl.DataFrame,
    pairs: pl.DataFrame | None = None,
) -> Exported:
    """Writes a file.

    Args:
        samples: sample_id, prompt, text.
        feedback: rows of FEEDBACK.
        pairs: rows of PAIRS; None: there are none.

    Raises:
        SettingsError: unknown or read-only format.
        ValueError: the format cannot hold feedback of this kind.
    """
    write = _format(format_name).write
    if write is None:
        raise SettingsError(
            f"{format_name}: this format is read-only; write `cut`, which holds the same data"
        )
    return write(path, samples, feedback, pairs if pairs is not None else pl.DataFrame(schema=PAIRS))


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise SettingsError(f"{name}: no such format{nearest(name, FORMATS)}; one of: {', '.join(FORMATS)}")
    return FORMATS[name]
