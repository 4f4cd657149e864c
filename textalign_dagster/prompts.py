"""Prompts: read from a file or a task, drawn for an iteration."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from pydantic import Field, model_validator

from textalign_dagster.ids import content_hash, derive_seed
from textalign_dagster.settings import Settings, SettingsError
from textalign_dagster.tables import PROMPT_DRAWS, conform

COLUMNS = ("prompt", "reference", "source", "source_revision")


DEFAULT_DRAW = 2048
"""Prompts drawn per iteration if the experiment does not set a number."""


class Prompts(Settings):
    """Which prompts an iteration draws."""

    path: str | None = Field(
        None,
        description="A .jsonl, .json, .csv or .parquet file with a column `prompt` (and optionally `reference`), "
        "instead of the task's own prompts; relative to the experiment file.",
    )
    per_iteration: int | None = Field(
        None, ge=1, description="Prompts drawn for each iteration; null: 2048, or all if there are fewer."
    )
    draw: Literal["without_replacement", "with_replacement", "windows", "weighted"] = Field(
        "without_replacement",
        description="without_replacement: no repeats within an iteration, and each draws from all prompts; "
        "with_replacement: repeats are distinct draws; windows: iterations take disjoint windows of one shuffled list; "
        "weighted: by `weights`, without replacement.",
    )
    weights: str | None = Field(
        None,
        description="For `draw: weighted`: SQL over the tables that returns prompt_id and weight "
        "(prompts it leaves out have weight 0).",
    )

    @model_validator(mode="after")
    def _weights_with_weighted(self) -> Prompts:
        if (self.draw == "weighted") != (self.weights is not None):
            raise ValueError("`weights` and `draw: weighted` belong together; give both or neither")
        return self


def prompt_id(prompt: str) -> str:
    """The id of a prompt: a hash of its text alone, so that sources can be joined."""
    return content_hash("prompt", prompt)


def following(text: str) -> pl.Expr:
    """The column ``text`` to continue ``prompt``: with a space in front, unless either has whitespace there."""
    apart = pl.col("prompt").str.contains(r"\s$") | pl.col(text).str.contains(r"^\s") | (pl.col(text) == "")
    return pl.when(apart).then(pl.col(text)).otherwise(pl.lit(" ") + pl.col(text))


def held_out(prompts: Iterable[str], count: int) -> set[str]:
    """``count`` of the prompts, chosen by a hash of their text alone, regardless of order."""
    return set(sorted(prompts, key=lambda text: content_hash("held out", text))[:count])


def read_prompt_file(path: Path) -> pl.DataFrame:
    """The prompts of a file, validated.

    Returns:
        Columns prompt, reference, source, source_revision.

    Raises:
        SettingsError: the file is missing, unreadable, not UTF-8, of an unknown type or empty, lacks the
            column, or has blank or duplicate prompts; the message names the rows.
    """
    readers: dict[str, Callable[[Path], pl.DataFrame]] = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".csv": _read_csv,
        ".parquet": partial(pl.read_parquet, glob=False),
    }
    if path.suffix not in readers:
        raise SettingsError(f"{path}: prompt files end in {', '.join(readers)}")
    if path.is_dir():
        raise SettingsError(f"{path}: is a folder; give one file")
    try:
        frame = readers[path.suffix](path)
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such prompt file") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except pl.exceptions.NoDataError:
        raise SettingsError(f"{path}: the file is empty") from None
    except (pl.exceptions.PolarsError, OSError) as error:
        problem = error.strerror if isinstance(error, OSError) and error.strerror else _problem(error)
        raise SettingsError(f"{path}: cannot be read as {path.suffix}: {problem}") from None
    if frame.is_empty():
        raise SettingsError(f"{path}: the file has no prompts")
    if "prompt" not in frame.columns:
        raise SettingsError(
            f"{path}: no column `prompt`; found {', '.join(frame.columns)}: rename one of them"
        )
    for column in ("prompt", "reference"):
        kind = frame.schema.get(column, pl.String())
        if kind != pl.String and not (kind == pl.Null and column == "reference"):
            raise SettingsError(f"{path}: column `{column}` holds {kind}, not text")
    blank = _rows(frame, pl.col("prompt").is_null() | (pl.col("prompt").str.strip_chars() == ""))
    if blank:
        raise SettingsError(f"{path}: blank prompt in {blank}; fill in or remove")
    twice = _rows(frame, pl.col("prompt").is_duplicated())
    if twice:
        raise SettingsError(
            f"{path}: the same prompt more than once, in {twice}; keep one of each "
            "(`prompts.draw: with_replacement` repeats prompts)"
        )
    revision = content_hash("prompts", frame["prompt"].to_list())
    reference = pl.col("reference") if "reference" in frame.columns else pl.lit(None)
    return frame.select(
        "prompt",
        reference=reference.cast(pl.String),
        source=pl.lit(path.name),
        source_revision=pl.lit(revision),
    )


def _read_csv(path: Path) -> pl.DataFrame:
    path.read_text(encoding="utf-8")  # polars' own message does not give the offset
    return pl.read_csv(path, infer_schema=False, glob=False)


def _read_json(path: Path) -> pl.DataFrame:
    """A JSON list of objects with ``prompt``, or in the format of Alpaca and AlpacaEval.

    The latter has ``instruction``, ``input`` and ``output``: the prompt is the instruction with its input
    below, and the output is the reference.
    """
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise SettingsError(f"{path}:{error.lineno}: broken JSON: {error.msg}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise SettingsError(f"{path}: not a JSON list of objects")
    found = []
    for number, row in enumerate(rows, start=1):
        prompt, reference = row.get("prompt"), row.get("reference")
        if prompt is None and "instruction" in row:
            given = row.get("input") or None
            prompt, reference = join_input(row["instruction"], given), row.get("output") or None
        if not isinstance(prompt, str) or not isinstance(reference, str | None):
            raise SettingsError(f"{path}: row {number}: no text in `prompt` or `instruction`")
        found.append({"prompt": prompt, "reference": reference})
    return pl.DataFrame(found, schema={"prompt": pl.String, "reference": pl.String})


def join_input(instruction: str, given: str | None, between: str = "\n") -> str:
    """Instruction and input as one prompt; without an input, the instruction alone."""
    return f"{instruction}{between}{given}" if given else instruction


def _read_jsonl(path: Path) -> pl.DataFrame:
    """``prompt`` and, where a line has one, ``reference``; other fields are ignored."""
    rows: list[dict[str, Any]] = []
    fields: dict[str, None] = {}
    # Not splitlines: it would split at U+2028 too, which JSON allows inside strings.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise SettingsError(f"{path}:{number}: not JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise SettingsError(f'{path}:{number}: expected an object such as {{"prompt": "…"}}')
        for field in ("prompt", "reference"):
            if not isinstance(row.get(field), str | None):
                raise SettingsError(f"{path}:{number}: `{field}` holds {row[field]!r}, not text")
        rows.append(row)
        fields |= dict.fromkeys(row)
    kept = [field for field in ("prompt", "reference") if field in fields]
    if not kept:  # only their names are used, in the error
        return pl.DataFrame({field: [None] * len(rows) for field in fields})
    return pl.DataFrame(rows, schema=dict.fromkeys(kept, pl.String))


def _problem(error: Exception) -> str:
    """The first line of a polars error; the rest is about polars' arguments."""
    return str(error).strip().splitlines()[0]


def _rows(frame: pl.DataFrame, condition: pl.Expr, show: int = 5) -> str:
    numbers = frame.with_row_index("row", offset=1).filter(condition)["row"].to_list()
    if not numbers:
        return ""
    more = f" and {len(numbers) - show} more" if len(numbers) > show else ""
    return f"row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers[:show]))}{more}"


def draw_prompts(
    prompts: pl.DataFrame,
    settings: Prompts,
    *,
    seed: int,
    iteration: int,
    weights: Mapping[str, float] | None = None,
) -> pl.DataFrame:
    """An iteration's draw: a pure function of its arguments.

    Args:
        prompts: prompt, reference, source, source_revision; one row per prompt.
        weights: prompt_id → weight, for ``draw: weighted``.

    Returns:
        Rows of :data:`textalign_dagster.tables.PROMPT_DRAWS`, in the order of the draw.

    Raises:
        SettingsError: too few prompts can be drawn, or a weight is negative or not finite.
    """
    ids = [prompt_id(text) for text in prompts["prompt"]]
    # The draw must not depend on the order in which the source lists its prompts.
    prompts = prompts.with_columns(prompt_id=pl.Series(ids, dtype=pl.String)).sort("prompt_id")
    count = prompts.height
    weight = np.ones(count)
    if settings.draw == "weighted":
        weight = np.array([(weights or {}).get(i, 0.0) for i in prompts["prompt_id"]], dtype=float)
        if not np.isfinite(weight).all() or (weight < 0).any():
            raise SettingsError("prompts.weights: the query returns a negative or non-finite weight")
    available = int((weight > 0).sum())
    size = settings.per_iteration or max(1, min(DEFAULT_DRAW, available))
    if settings.draw == "windows":
        start = (iteration - 1) * size
        order = np.random.default_rng(derive_seed(seed, "prompt windows")).permutation(count)
        rows = order[start : start + size]
        available = max(0, count - start)
    else:
        rng = np.random.default_rng(derive_seed(seed, "prompt draw", iteration))
        if settings.draw == "with_replacement":
            rows = rng.integers(count, size=size)
            available = size
        else:
            # Exponential races: the k smallest of Exp(1)/w are a weighted draw without replacement.
            with np.errstate(divide="ignore"):
                race = rng.exponential(size=count) / weight
            rows = np.argsort(race, kind="stable")[:size]
    if available < size:
        raise SettingsError(
            f"prompts.per_iteration: {size} prompts requested in iteration {iteration}, but "
            f"{settings.draw} can draw {available} of {count}; lower it or add prompts"
        )
    drawn = prompts[rows].with_columns(weight=pl.Series(weight[rows]))
    drawn = drawn.with_columns(draw_index=pl.int_range(pl.len()).over("prompt_id").cast(pl.Int32))
    keys = drawn.select("prompt_id", "draw_index").rows()
    return conform(
        drawn.with_columns(
            draw_id=pl.Series(
                [content_hash("draw", seed, iteration, p, i) for p, i in keys], dtype=pl.String
            ),
            seed=pl.Series([derive_seed(seed, "draw", iteration, p, i) for p, i in keys], dtype=pl.Int64),
        ),
        PROMPT_DRAWS,
        "prompt_draws",
    )
