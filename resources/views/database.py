"""The store's tables as DuckDB views.

Every table of `TABLES` is a view over all cells that have it, with ``experiment`` (VARCHAR) and
``iteration`` (INTEGER) first. A file that several cells point to appears once for each of them. The
data is read from Parquet when queried; nothing is copied and nothing can be written through these
views. The same holds for ``feedback_calls``, the ledger, except for the most recent calls: these are
copied on connecting (``recent_feedback_calls``). In addition to the tables:

- ``cells``: which artifact is which cell's output, with settings and checks; ``manifests``: how
  each artifact was produced; ``files``: which files the views read;
- ``samples``: each sample with its prompt, feedback and fate in its iteration's pool, one row each;
- ``preference_batches``: the examples trained on, one row per example or pair;
- ``costs``: seconds and dollars of each stage of each cell; ``reused``: another cell paid;
- ``lineage``: which policy came from which parent, pool, experiment and iteration.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import duckdb
import polars as pl

from resources.judges.ledger import Ledger
from resources.judges.ledger_records import STATUS_RANK
from resources.store import Artifact, ArtifactError, ArtifactStore
from resources.store.durable import make_folder, temporary_name
from resources.views.sql import (
    COSTS,
    LINEAGE,
    PREFERENCE_BATCHES,
    SAMPLES,
    ledger_doubles,
    ledger_source,
    ledger_view,
    table_view,
)
from textalign_dagster import tables
from textalign_dagster.disk import sync
from textalign_dagster.judging.pairs import PAIRS

TABLES: Mapping[str, pl.Schema] = {
    "prompt_draws": tables.PROMPT_DRAWS,
    "generations": tables.GENERATIONS,
    "feedback": tables.FEEDBACK,
    "pairs": PAIRS,
    "feedback_repeats": tables.FEEDBACK_REPEATS,
    "feedback_spans": tables.FEEDBACK_SPANS,
    "datapool": tables.DATAPOOL,
    "examples": tables.EXAMPLES,
    "checkpoints": tables.CHECKPOINTS,
    "scores": tables.SCORES,
    "evaluation_samples": tables.EVALUATION_SAMPLES,
    "scenario_samples": tables.SCENARIO_SAMPLES,
    "red_team": tables.RED_TEAM,
    "lm_eval": tables.LM_EVAL,
    "rewards": tables.REWARDS,
    "candidates": tables.CANDIDATES,
}

MANIFESTS = pl.Schema(
    {
        "stage": pl.String(),  # primary key, with key
        "key": pl.String(),
        "attempt": pl.String(),
        "created_at": pl.Datetime("ms"),  # UTC
        "host": pl.String(),
        "code_revision": pl.String(),
        "environment_hash": pl.String(),
        "seed": pl.Int64(),
        "seconds": pl.Float64(),  # as recorded by the stage, else the wall time of computing it
        "gpu_seconds": pl.Float64(),
        "usd": pl.Float64(),
        "rows": pl.Int64(),  # of all its tables
        "bytes": pl.Int64(),  # of all its files
        "inputs": pl.String(),  # JSON, like the following
        "settings": pl.String(),
        "versions": pl.String(),
        "environment": pl.String(),
        "facts": pl.String(),
    }
)
FILES = pl.Schema(
    {
        "experiment": pl.String(),
        "iteration": pl.Int32(),
        "table_name": pl.String(),
        "path": pl.String(),
        "rows": pl.Int64(),
        "bytes": pl.Int64(),
    }
)


def connect(store: ArtifactStore, *, skip_damaged: bool = False) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB with all views, as of now; the caller closes it.

    With ``skip_damaged``, cells whose artifact is missing or damaged are left out of the tables,
    and ``cells.problem`` says why.

    Raises:
        ArtifactError: a cell's artifact is missing or damaged.
    """
    survey = _survey(store, skip_damaged)
    connection = duckdb.connect()
    filesystem = store.storage.filesystem()
    if filesystem is not None:
        connection.register_filesystem(filesystem)
    _define(connection, survey, store)
    return connection


def write_catalog(store: ArtifactStore, *, skip_damaged: bool = False) -> Path:
    """Write ``{root}/catalog.duckdb``: the same views, for the ``duckdb`` program and notebooks.

    It holds no data except the ledger's most recent rows; cells computed later appear when it is written again. Open
    it read-only. Processes reading the old file keep it.

    Raises:
        ArtifactError: the store is not a local folder, or holds something missing or damaged.
    """
    if store.is_remote:
        raise ArtifactError(
            f"a catalog file requires a local store, and {store.root} is not one: use `textalign sql`"
        )
    survey = _survey(store, skip_damaged)
    make_folder(store.local)
    target = store.local / "catalog.duckdb"
    temporary = temporary_name(target)
    try:
        with duckdb.connect(temporary) as connection:
            _define(connection, survey, store)
        sync(temporary)
        temporary.replace(target)
        sync(store.local)
    except (duckdb.Error, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ArtifactError(f"cannot write {target}: {reason}; check disk space and permissions") from error
    finally:
        temporary.unlink(missing_ok=True)
    return target


@dataclass(frozen=True)
class _Survey:
    cells: pl.DataFrame
    manifests: pl.DataFrame
    files: pl.DataFrame
    columns: Mapping[str, list[tuple[str, ...]]]  # table → the columns of each of its files


def _survey(store: ArtifactStore, skip_damaged: bool) -> _Survey:
    """Every cell's artifact, checked for missing and truncated files."""
    cells = store.cells().with_columns(pl.col("assigned_at").dt.replace_time_zone(None))
    keys = cells.select("stage", "key").unique(maintain_order=True).rows()
    found = dict(zip(keys, store.each(lambda key: _look(store, *key), keys), strict=True))
    problems = {key: what for key, what in found.items() if isinstance(what, str)}
    if problems and not skip_damaged:
        more = f" ({len(problems) - 1} more artifacts are also damaged)" if len(problems) > 1 else ""
        raise ArtifactError(next(iter(problems.values())) + more)
    artifacts = {key: what for key, what in found.items() if isinstance(what, Artifact)}
    files = [
        {
            "experiment": cell["experiment"],
            "iteration": cell["iteration"],
            "table_name": table,
            "path": artifact.url(table),
            "rows": file["rows"],
            "bytes": file["bytes"],
        }
        for cell in cells.iter_rows(named=True)
        if (artifact := artifacts.get((cell["stage"], cell["key"]))) is not None
        for table, file in artifact.tables.items()
    ]
    columns: dict[str, list[tuple[str, ...]]] = {}
    for artifact in artifacts.values():
        for table, file in artifact.tables.items():
            columns.setdefault(table, []).append(tuple(file["columns"]))
    problem = [problems.get(key) for key in cells.select("stage", "key").rows()]
    return _Survey(
        cells.with_columns(pl.Series("problem", problem, dtype=pl.String)),
        pl.DataFrame([_manifest_row(a) for a in artifacts.values()], schema=MANIFESTS),
        pl.DataFrame(files, schema=FILES),
        columns,
    )


def _look(store: ArtifactStore, stage: str, key: str) -> Artifact | str:
    try:
        artifact = store.find(stage, key)
    except ArtifactError as error:
        return str(error)
    return artifact or (
        f"artifact {stage} {key}, which cells point at, is not in {store.root}: run the stage again"
    )


def _manifest_row(artifact: Artifact) -> dict[str, Any]:
    manifest, facts = artifact.manifest, artifact.manifest["facts"]
    row = {name: manifest.get(name) for name in MANIFESTS}
    for name in ("inputs", "settings", "versions", "environment", "facts"):
        row[name] = json.dumps(manifest.get(name), sort_keys=True)
    return row | {
        "created_at": datetime.fromisoformat(manifest["created_at"]).replace(tzinfo=None),
        "seconds": facts.get("seconds", manifest["seconds"]),
        "gpu_seconds": facts.get("gpu_seconds"),
        "usd": facts.get("usd"),
        "rows": sum(file.get("rows", 0) for file in manifest["files"]),
        "bytes": sum(file["bytes"] for file in manifest["files"]),
    }


def _define(connection: duckdb.DuckDBPyConnection, survey: _Survey, store: ArtifactStore) -> None:
    json_columns = {
        "cells": ["checks", "settings"],
        "manifests": ["inputs", "settings", "versions", "environment", "facts"],
        "files": [],
    }
    for name, columns in json_columns.items():
        connection.register("_rows", getattr(survey, name))
        casts = ", ".join(f"{column}::JSON AS {column}" for column in columns)
        star = f"* REPLACE ({casts})" if casts else "*"
        connection.execute(f"CREATE TABLE {name} AS SELECT {star} FROM _rows")
        connection.unregister("_rows")
    for table in sorted({*TABLES, *survey.columns}):
        files = survey.files.filter(table_name=table)["path"].unique(maintain_order=True)
        connection.execute(table_view(table, TABLES.get(table), files, survey.columns.get(table, [])))
    with Ledger(store) as ledger:
        paths, recent = ledger.parts()
    connection.register("_rows", recent)  # a snapshot: these change while calls are made
    connection.execute("CREATE TABLE recent_feedback_calls AS SELECT * FROM _rows")
    connection.unregister("_rows")
    source = ledger_source(map(str, paths), "recent_feedback_calls")
    found = connection.execute(ledger_doubles(source)).fetchone() if paths else None
    # A killed compaction leaves calls in both a file and segments.
    connection.execute(ledger_view(source, STATUS_RANK if found and found[0] else None))
    for view in (SAMPLES, PREFERENCE_BATCHES, COSTS, LINEAGE):
        connection.execute(view)
