"""Ratings and rankings of sparse_feedback (Bansal et al., 2023): CSV files.

``instruction, input, response, score`` and ``instruction, input, response1, response2, feedback``,
the latter one of ``(a)`` (response1 is better), ``(b)``, ``equal``. Files written by judges have no
header, those written by converters have one; both are read. Every run appended to them, so repeated
rows are common (the first counts), and pandas turned empty inputs into ``nan``.
"""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import polars as pl

from textalign_dagster.feedback_files.exported import (
    Exported,
    compared_samples,
    exported,
    judged_samples,
    one_aspect,
    write_file,
)
from textalign_dagster.feedback_files.imported import Collector, Imported, Refusal, collector, read_text
from textalign_dagster.prompts import join_input, prompt_id

RATINGS = ("instruction", "input", "response", "score")
RANKINGS = ("instruction", "input", "response1", "response2", "feedback")

_WINNERS = {"(a)": "a", "(b)": "b", "equal": "tie"}
_FEEDBACK = {winner: text for text, winner in _WINNERS.items()}
_LARGEST_FIELD = 2**31 - 1  # Python's default is 131,072 characters


def read_sparse_ratings(path: Path, *, aspect: str = "rating", low: int = 1, high: int = 7) -> Imported:
    """Reads ratings; a score that is not a whole number on the scale is ``unparseable``."""

    def take(rows: Collector, row: Sequence[str]) -> None:
        instruction, given, response, score = row
        sample = rows.sample(_prompt(rows, instruction, given), response)
        try:
            value = float(score)
        except ValueError:
            value = math.nan
        if math.isfinite(value) and value.is_integer() and low <= value <= high:
            rows.judged(sample, "rating", value=value)
        else:
            reason = f"{score!r} is not a whole number from {low} to {high}"
            rows.judged(sample, "rating", status="unparseable", reason=reason)

    return _read(path, RATINGS, aspect, take)


def read_sparse_rankings(path: Path, *, aspect: str = "ranking") -> Imported:
    """Reads rankings as pairs; anything but ``(a)``, ``(b)`` and ``equal`` is ``unparseable``."""

    def take(rows: Collector, row: Sequence[str]) -> None:
        instruction, given, first, second, feedback = row
        prompt = _prompt(rows, instruction, given)
        if first == second:
            same = rows.sample(prompt, first)
            rows.identical.append((same, prompt_id(prompt), _WINNERS.get(feedback.strip())))
            raise Refusal("both responses are the same text")
        a, b = rows.sample(prompt, first), rows.sample(prompt, second)
        winner = _WINNERS.get(feedback.strip())
        if winner:
            rows.compared(prompt, a, b, winner)
        else:
            rows.compared(
                prompt, a, b, None, "unparseable", reason=f"{feedback!r} is not one of {', '.join(_WINNERS)}"
            )

    return _read(path, RANKINGS, aspect, take)


def write_sparse_ratings(path: Path, samples: pl.DataFrame, feedback: pl.DataFrame) -> Exported:
    """Writes ratings of one aspect, without a header; the format holds only whole numbers with status ok."""
    one_aspect(feedback, ("rating",), "rating")
    rows: dict[tuple[str, str], list[str]] = {}
    left_out = Counter[str]()
    for row in judged_samples(samples, feedback):
        key = (row["prompt"], row["response"])
        if row["status"] != "ok":
            left_out[f"{row['status']}: the format cannot hold it"] += 1
        elif not row["value"].is_integer():
            left_out["not a whole number"] += 1
        elif key in rows:
            left_out["same prompt and response as an earlier row: readers keep the first"] += 1
        else:
            rows[key] = [row["prompt"], "", row["response"], str(int(row["value"]))]
    return _write(path, list(rows.values()), left_out)


def write_sparse_rankings(path: Path, samples: pl.DataFrame, pairs: pl.DataFrame) -> Exported:
    """Writes pairs of one aspect, without a header; the position that a tie favoured is lost.

    Args:
        pairs: rows of PAIRS.
    """
    if pairs["aspect"].n_unique() > 1:
        raise ValueError("ranking files hold one aspect; filter the pairs")
    rows: dict[tuple[str, frozenset[str]], list[str]] = {}
    left_out = Counter[str]()
    for pair, prompt, first, second in compared_samples(samples, pairs):
        key = (prompt, frozenset((first, second)))
        if pair["status"] != "ok":
            left_out[f"{pair['status']}: the format cannot hold it"] += 1
        elif first == second:
            left_out["both responses are the same text"] += 1
        elif key in rows:
            left_out["same prompt and responses as an earlier row: readers keep the first"] += 1
        else:
            rows[key] = [prompt, "", first, second, _FEEDBACK[pair["winner"]]]
    return _write(path, list(rows.values()), left_out)


def _prompt(rows: Collector, instruction: str, given: str) -> str:
    if not instruction.strip():
        raise Refusal("`instruction` is blank")
    if given == "nan":
        rows.notes["`nan` in the column input was read as no input"] += 1
        given = ""
    return join_input(instruction, given, "\n\nInput:\n")


def _read(
    path: Path, columns: Sequence[str], aspect: str, take: Callable[[Collector, Sequence[str]], None]
) -> Imported:
    content = read_text(path)
    rows = collector(path, content, aspect)
    for line, row in _csv_rows(content):
        if line == 1 and isinstance(row, list) and row[:3] == list(columns[:3]) and len(row) == len(columns):
            rows.notes["the first line is a header"] += 1
            continue
        rows.rows += 1
        try:
            if isinstance(row, str):
                raise Refusal(f"broken CSV: {row}")
            if len(row) != len(columns):
                raise Refusal(f"{len(row)} columns instead of {len(columns)} ({', '.join(columns)})")
            take(rows, row)
        except Refusal as reason:
            rows.refuse(line, str(reason), row)
    return rows.done()


def _csv_rows(content: str) -> Iterator[tuple[int, list[str] | str]]:
    """(first line, fields) of every non-blank row; a row that is not valid CSV yields its error message."""
    limit = csv.field_size_limit(_LARGEST_FIELD)
    try:
        reader = csv.reader(io.StringIO(content, newline=""), strict=True)
        while True:
            line = reader.line_num + 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, str(error)
                continue
            if row:
                yield line, row
    finally:
        csv.field_size_limit(limit)


def _write(path: Path, rows: list[list[str]], left_out: Counter[str]) -> Exported:
    text = io.StringIO(newline="")
    # Quote everything: the writer does not quote a lone carriage return, at which readers would split the row.
    csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows(rows)
    write_file(path, text.getvalue())
    return exported(len(rows), left_out)
