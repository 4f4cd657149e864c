"""Corpora: documents from a file, in place of the policy's samples.

A file is divided into shards of a fixed number of documents: a shard is a row of ``prompt_draws``, its documents are
rows of ``generations`` with an empty prompt. Only the drawn shards are read, so a corpus may be larger than memory;
every iteration has its own feedback, pool and checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import polars as pl

from textalign_dagster.ids import content_hash
from textalign_dagster.prompts import COLUMNS, prompt_id
from textalign_dagster.scorers.file_stamps import file_hash
from textalign_dagster.segments import cut, joined
from textalign_dagster.settings import SettingsError
from textalign_dagster.settings.offline import Offline

SCORED = "texts", "scores"
"""Columns of a corpus that was cut and scored elsewhere (as by Korbak et al.): segments, scores (higher is worse)."""


Document = tuple[str, list[tuple[int, int, float | None]]]
"""A text, and (start, end, score) of each of its segments."""


def shards(offline: Offline) -> pl.DataFrame:
    """The shards of a corpus, as prompts that iterations draw: prompt (the shard's name), reference, source, ….

    Raises:
        SettingsError: the file cannot be read as a corpus; the message says why.
    """
    content = file_hash(Path(offline.path))
    if content is None:
        raise SettingsError(f"offline.path: {offline.path}: no such file")
    return _shards(offline, content)


def documents(offline: Offline, draws: pl.DataFrame) -> pl.DataFrame:
    """The documents of the drawn shards; empty ones are left out.

    Args:
        draws: draw_id, prompt_id; in the order of the draw.

    Returns:
        draw_id, own_id, sample_id, prompt_id, prompt (empty), text, sample_index.
    """
    rows = [
        (one.draw_id, one.of_shard, one.sample_id, one.number, one.place, one.text, "")
        for one in _drawn(offline, draws)
        if one.text
    ]
    columns = ("draw_id", "prompt_id", "sample_id", "own_id", "sample_index", "text", "prompt")
    schema = dict.fromkeys(columns, pl.String) | {"sample_index": pl.Int32}
    return pl.DataFrame(rows, schema, orient="row")


def segments(offline: Offline, draws: pl.DataFrame) -> pl.DataFrame:
    """The segments of the drawn shards' documents, in order.

    Args:
        draws: as for :func:`documents`.

    Returns:
        sample_id, start, end (characters of the document), text, score (higher is worse; NULL: the file has none).
    """
    rows = [
        (one.sample_id, start, end, one.text[start:end], score)
        for one in _drawn(offline, draws)
        for start, end, score in one.segments
    ]
    schema = {
        "sample_id": pl.String,
        "start": pl.Int32,
        "end": pl.Int32,
        "text": pl.String,
        "score": pl.Float64,
    }
    return pl.DataFrame(rows, schema, orient="row")


def scored_elsewhere(offline: Offline) -> bool:
    """Whether the file has scores of its segments."""
    return _has_scores(offline, file_hash(Path(offline.path)))


def _has_scores(offline: Offline, content: str | None) -> bool:
    return set(SCORED) <= set(_columns(offline, content))


class _Drawn(NamedTuple):
    """A document of a drawn shard; ``number`` counts from 1 in the file, ``place`` from 0 in the shard."""

    draw_id: str
    of_shard: str
    sample_id: str
    number: str
    place: int
    text: str
    segments: list[tuple[int, int, float | None]]


def _drawn(offline: Offline, draws: pl.DataFrame) -> Iterator[_Drawn]:
    """The documents of the drawn shards, one shard after the other."""
    numbers = {prompt_id(name): i for i, name in enumerate(shards(offline)["prompt"])}
    content = file_hash(Path(offline.path))
    for draw_id, of_shard in draws.select("draw_id", "prompt_id").iter_rows():
        shard = numbers[of_shard]
        for i, (text, found) in enumerate(_read(offline, content, shard)):
            sample_id = content_hash("document", draw_id, i)
            yield _Drawn(draw_id, of_shard, sample_id, str(shard * offline.shard + i + 1), i, text, found)


def _scan(offline: Offline) -> pl.LazyFrame:
    path = Path(offline.path)
    return (
        pl.scan_parquet(path) if path.suffix == ".parquet" else pl.scan_ndjson(path, infer_schema_length=1000)
    )


@lru_cache(maxsize=8)
def _columns(offline: Offline, content: str | None) -> tuple[str, ...]:
    try:
        return tuple(_scan(offline).collect_schema())
    except (pl.exceptions.PolarsError, OSError) as error:
        raise SettingsError(
            f"offline.path: {offline.path}: cannot be read as Parquet or JSON Lines ({error})"
        ) from None


@lru_cache(maxsize=8)
def _shards(offline: Offline, content: str) -> pl.DataFrame:
    columns = _columns(offline, content)
    if "text" not in columns and not _has_scores(offline, content):
        raise SettingsError(
            f"offline.path: {offline.path}: has the columns {', '.join(columns)}; a corpus needs `text`, or the "
            "segments `texts` with their `scores`"
        )
    count = _scan(offline).select(pl.len()).collect().item()
    if count == 0:
        raise SettingsError(f"offline.path: {offline.path}: has no documents")
    name = Path(offline.path).name
    starts = range(0, count, offline.shard)
    names = [f"{name}, documents {at + 1} to {min(at + offline.shard, count)}" for at in starts]
    frame = pl.DataFrame({"prompt": names})
    return frame.with_columns(
        reference=pl.lit(None, dtype=pl.String), source=pl.lit(name), source_revision=pl.lit(content)
    ).select(COLUMNS)


@lru_cache(maxsize=4)
def _read(offline: Offline, content: str | None, shard: int) -> list[Document]:
    """The documents of a shard, each with its segments and their scores."""
    rows = _scan(offline).slice(shard * offline.shard, offline.shard)
    if not _has_scores(offline, content):
        texts = rows.select(pl.col("text").cast(pl.String).fill_null("")).collect()["text"]
        return [(text, [(*place, None) for place in cut(text, offline.segments)]) for text in texts]
    found: list[Document] = []
    for i, (pieces, scores) in enumerate(
        rows.select(*SCORED).collect().iter_rows(), start=shard * offline.shard + 1
    ):
        if pieces is None or scores is None or len(pieces) != len(scores) or None in (*pieces, *scores):
            raise SettingsError(
                f"offline.path: {offline.path}: document {i}: texts, scores: must be two lists of the same length without "
                "nulls"
            )
        text, places = joined(pieces)
        kept: list[tuple[int, int, float | None]] = [
            (*place, float(score)) for place, score in zip(places, scores, strict=True) if place[0] < place[1]
        ]
        found.append((text, kept))
    return found
