"""The DuckDB views: every table, every cell once, whatever the files look like."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pytest

from resources.store import ArtifactError, ArtifactStore
from resources.views import TABLES, connect, write_catalog
from textalign_dagster.tables import EVALUATION_SAMPLES, FEEDBACK, GENERATIONS, measure, measures

STAGES = {
    "prompt_draws": ["prompt_draws"],
    "generations": ["generations"],
    "feedback": ["feedback", "pairs", "feedback_repeats", "feedback_spans"],
    "datapool": ["datapool", "examples"],
    "checkpoint": ["checkpoints"],
    "evaluation": [
        "scores",
        "evaluation_samples",
        "scenario_samples",
        "red_team",
        "lm_eval",
        "rewards",
        "candidates",
    ],
}


def rows(table: str, values: list[dict[str, Any]], schema: pl.Schema | None = None) -> pl.DataFrame:
    """A table with the given values, and NULL elsewhere."""
    schema = schema or TABLES[table]
    return pl.DataFrame([{**dict.fromkeys(schema), **row} for row in values], schema=schema)


def put(
    store: ArtifactStore,
    cell: tuple[str, int],
    stage: str,
    key: str,
    frames: dict[str, pl.DataFrame],
    **facts: Any,
) -> None:
    """Create an artifact with these tables unless it exists, and point the cell at it."""

    def fill(draft: Any) -> None:
        for name, frame in frames.items():
            draft.write(name, frame, frame.schema)
        draft.record(**facts)

    artifact = store.make(stage, key, fill, inputs={"policy": "p0"}, settings={"n": 1})
    store.assign(*cell, stage, artifact, settings={"lr": 0.1}, checks={"enough": True})


def query(store: ArtifactStore, sql: str) -> list[tuple[Any, ...]]:
    with connect(store) as connection:
        return connection.execute(sql).fetchall()


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ArtifactStore:
    monkeypatch.setattr(os, "fsync", lambda handle: None)  # durability is not tested here
    return ArtifactStore(tmp_path / "store")


def columns(store: ArtifactStore) -> dict[str, list[tuple[str, str]]]:
    with connect(store) as connection:
        return {
            table: [(name, kind) for name, kind, *_ in connection.execute(f"DESCRIBE {table}").fetchall()]
            for table in [
                *TABLES,
                "samples",
                "preference_batches",
                "costs",
                "lineage",
                "cells",
                "manifests",
                "files",
            ]
        }


def test_an_empty_store_has_every_view_with_its_columns(store: ArtifactStore) -> None:
    empty = columns(store)
    for table, schema in TABLES.items():
        assert [name for name, _ in empty[table]] == ["experiment", "iteration", *schema]
        assert empty[table][:2] == [("experiment", "VARCHAR"), ("iteration", "INTEGER")]
        assert query(store, f"SELECT * FROM {table}") == []
    for stage, tables in STAGES.items():
        put(store, ("exp", 1), stage, "k", {table: rows(table, [{}]) for table in tables})
    assert columns(store) == empty, "filled views have the columns and types of empty ones"
    for table in TABLES:
        assert query(store, f"SELECT experiment, iteration FROM {table}") == [("exp", 1)]


def test_a_shared_file_appears_once_per_cell(store: ArtifactStore) -> None:
    shared = {"generations": rows("generations", [{"sample_id": "s1"}, {"sample_id": "s2"}])}
    for cell in [("a", 1), ("b", 1), ("b", 10)]:
        put(store, cell, "generations", "k1", shared)
    put(store, ("b", 2), "generations", "k2", {"generations": rows("generations", [{"sample_id": "s3"}])})
    result = query(store, "SELECT experiment, iteration, sample_id FROM generations ORDER BY ALL")
    assert result == [
        *[("a", 1, s) for s in ("s1", "s2")],
        *[("b", 1, s) for s in ("s1", "s2")],
        ("b", 2, "s3"),
        *[("b", 10, s) for s in ("s1", "s2")],
    ]
    assert query(store, "SELECT count(*) FROM generations WHERE iteration > 2") == [(2,)]
    assert query(store, "SELECT sum(rows) FROM files WHERE table_name = 'generations'") == [(7,)]


def test_a_reassigned_cell_shows_its_new_artifact(store: ArtifactStore) -> None:
    for key in ("k1", "k2"):
        put(store, ("a", 1), "generations", key, {"generations": rows("generations", [{"sample_id": key}])})
    assert query(store, "SELECT sample_id FROM generations") == [("k2",)]


def test_measures_of_different_tasks_are_read_together(store: ArtifactStore) -> None:
    tasks: list[tuple[str, dict[str, float | None]]] = [
        ("pep8", {"errors": 2, "clean": False}),
        ("pii", {"names": None}),
    ]
    for experiment, values in tasks:
        frame = rows("evaluation_samples", [{"sample_id": experiment}]).with_columns(measures([values]))
        assert frame.schema == EVALUATION_SAMPLES
        put(store, (experiment, 0), "evaluation", experiment, {"evaluation_samples": frame})
    result = query(
        store, "SELECT experiment, iteration, measures['errors'], measures FROM evaluation_samples ORDER BY 1"
    )
    assert result == [("pep8", 0, 2.0, {"errors": 2.0, "clean": 0.0}), ("pii", 0, None, {"names": None})]


def test_measure_is_a_column() -> None:
    frame = measures([{"a": 1, "b": None}, {}, {"b": 0.5}]).to_frame()
    assert frame.select(measure("a"), measure("b")).rows() == [(1.0, None), (None, None), (None, 0.5)]
    empty = measures([]).to_frame()
    assert empty.select(measure("a")).schema == {"a": pl.Float64()}


def test_files_written_by_older_versions(store: ArtifactStore) -> None:
    """Columns missing from a file are NULL, whether or not other files have them; order does not matter."""
    old = {name: kind for name, kind in GENERATIONS.items() if name not in ("seed", "logprob")}
    old = dict(reversed(old.items())) | {"dropped_since": pl.String()}
    put(
        store,
        ("a", 1),
        "generations",
        "old",
        {"generations": rows("generations", [{"sample_id": "old"}], pl.Schema(old))},
    )
    sql = "SELECT sample_id, logprob FROM generations ORDER BY 1"
    assert query(store, sql) == [("old", None)]
    new = rows("generations", [{"sample_id": "new", "logprob": -1.5}])
    put(store, ("a", 2), "generations", "new", {"generations": new})
    assert query(store, sql) == [("new", -1.5), ("old", None)]


def test_tables_of_newer_versions_are_shown_unchanged(store: ArtifactStore) -> None:
    frame = pl.DataFrame({"sample_id": ["s"], "ratio": [0.5]})
    put(store, ("a", 1), "extra", "k", {"extra": frame})
    assert query(store, "SELECT * FROM extra") == [("a", 1, "s", 0.5)]


def test_the_samples_view_joins_feedback_and_datapool(store: ArtifactStore) -> None:
    generations = [{"sample_id": f"s{n}", "prompt": "p", "text": f"t{n}", "n_tokens": n} for n in (1, 2, 3)]
    feedback: list[dict[str, Any]] = [
        {"sample_id": "s1", "aspect": "style", "kind": "reward", "value": 1.0, "status": "ok"},
        {"sample_id": "s1", "aspect": "length", "kind": "text", "text": "long", "status": "ok"},
        {"sample_id": "s2", "aspect": "style", "status": "failed", "reason": "no answer"},
    ]
    pool = [
        {"sample_id": "s0", "origin": 1, "label": "good", "drawn": True, "reason": "quota"},
        {"sample_id": "s1", "origin": 2, "label": "bad", "drawn": False, "reason": "full"},
    ]
    for cell in [("a", 2), ("b", 2)]:
        put(store, cell, "generations", "g", {"generations": rows("generations", generations)})
        put(store, cell, "feedback", "f", {"feedback": rows("feedback", feedback)})
    put(store, ("a", 2), "datapool", "p", {"datapool": rows("datapool", pool)})
    put(store, ("a", 3), "datapool", "q", {"datapool": rows("datapool", pool)})
    result = query(
        store,
        "SELECT sample_id, text, feedback_aspect, feedback_kind, feedback_value, feedback_text, "
        "feedback_status, len(feedback), pool_label, pool_drawn, pool_reason "
        "FROM samples WHERE experiment = 'a' ORDER BY sample_id",
    )
    assert result == [
        ("s1", "t1", "length", "text", None, "long", "ok", 2, "bad", False, "full"),
        ("s2", "t2", "style", None, None, None, "failed", 1, None, None, None),
        ("s3", "t3", None, None, None, None, None, None, None, None, None),
    ]
    assert query(
        store, "SELECT experiment, count(*), count(pool_label) FROM samples GROUP BY 1 ORDER BY 1"
    ) == [
        ("a", 3, 1),
        ("b", 3, 0),
    ]


def test_costs_are_counted_once(store: ArtifactStore) -> None:
    frames = {"feedback": pl.DataFrame(schema=FEEDBACK)}
    for cell in [("a", 1), ("b", 1), ("b", 1), ("a", 2)]:
        put(store, cell, "feedback", "shared", frames, usd=2.5, seconds=7.0, gpu_seconds=3.0)
    put(store, ("b", 2), "feedback", "own", frames)  # records no cost; the wall time is always recorded
    result = query(store, "SELECT experiment, iteration, seconds, usd, reused FROM costs ORDER BY 1, 2")
    assert result[:3] == [("a", 1, 7.0, 2.5, False), ("a", 2, 7.0, 2.5, True), ("b", 1, 7.0, 2.5, True)]
    assert result[3][2] is not None and result[3][3:] == (None, False)
    spent = query(store, "SELECT sum(usd), sum(gpu_seconds) FROM costs WHERE NOT reused")
    assert spent == [(2.5, 3.0)]


def test_costs_are_counted_if_the_payer_died_before_assigning_its_cell(store: ArtifactStore) -> None:
    store.make("feedback", "k", lambda d: d.record(usd=1.0), inputs={}, settings={})
    put(store, ("a", 1), "feedback", "k", {})
    assert store.cells()["reused"].to_list() == [True]
    assert query(store, "SELECT usd, reused FROM costs") == [(1.0, False)]


def test_lineage_manifests_and_cells(store: ArtifactStore) -> None:
    for iteration in (1, 2):
        row = {"policy_hash": f"p{iteration}", "parent": f"p{iteration - 1}", "pool_hash": f"d{iteration}"}
        put(
            store,
            ("a", iteration),
            "checkpoint",
            f"k{iteration}",
            {"checkpoints": rows("checkpoints", [row])},
        )
    assert query(
        store, "SELECT policy_hash, parent, pool_hash, experiment, iteration FROM lineage ORDER BY 1"
    ) == [
        ("p1", "p0", "d1", "a", 1),
        ("p2", "p1", "d2", "a", 2),
    ]
    sql = "SELECT settings->>'lr', checks->'enough', passed, problem FROM cells WHERE iteration = 1"
    assert query(store, sql) == [("0.1", "true", True, None)]
    sql = "SELECT inputs->>'policy', environment->>'polars', rows, bytes > 0 FROM manifests WHERE key = 'k1'"
    assert query(store, sql) == [("p0", pl.__version__, 1, True)]


@pytest.mark.parametrize("name", ["it's", "a[1]b", "iteration=001", "star*", "with blank", "experiment=x/ü"])
def test_any_folder_name_works(tmp_path: Path, name: str) -> None:
    store = ArtifactStore(tmp_path / name)
    put(store, ("a", 1), "generations", "k", {"generations": rows("generations", [{"sample_id": "s"}])})
    assert query(store, "SELECT experiment, iteration, sample_id FROM generations") == [("a", 1, "s")]


def test_damage_is_reported_or_skipped_on_request(store: ArtifactStore) -> None:
    for iteration in (1, 2, 3):
        frame = rows("generations", [{"sample_id": str(iteration)}])
        put(store, ("a", iteration), "generations", f"k{iteration}", {"generations": frame})
    artifact = store.find("generations", "k1")
    assert artifact is not None
    Path(artifact.url("generations")).unlink()
    store.remove("generations", "k2")
    for open_views in (connect, write_catalog):
        with pytest.raises(ArtifactError, match=r"generations k1 is damaged.*\(1 more"):
            open_views(store)
    with connect(store, skip_damaged=True) as connection:
        assert connection.execute("SELECT iteration FROM generations").fetchall() == [(3,)]
        problems = connection.execute("SELECT problem FROM cells ORDER BY iteration").fetchall()
    assert "generations.parquet is missing" in problems[0][0]
    assert "is not in" in problems[1][0]
    assert problems[2] == (None,)


def test_views_are_read_only(store: ArtifactStore) -> None:
    put(store, ("a", 1), "generations", "k", {"generations": rows("generations", [{"sample_id": "s"}])})
    with connect(store) as connection:
        for sql in ("DELETE FROM generations", "UPDATE generations SET text = 'x'"):
            with pytest.raises(duckdb.Error):
                connection.execute(sql)


def test_the_catalog_can_be_read_by_other_programs(store: ArtifactStore, tmp_path: Path) -> None:
    put(store, ("a", 1), "generations", "k", {"generations": rows("generations", [{"sample_id": "s"}])})
    path = write_catalog(store)
    assert path == store.local / "catalog.duckdb"
    script = (
        "import duckdb, sys\n"
        "with duckdb.connect(sys.argv[1], read_only=True) as c:\n"
        "    print(c.execute('SELECT experiment, iteration, sample_id FROM samples').fetchall())\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(path)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[('a', 1, 's')]"


def test_the_catalog_can_be_replaced_while_others_read_it(store: ArtifactStore) -> None:
    assert write_catalog(store).exists(), "an empty store has a catalog, too"
    with duckdb.connect(store.local / "catalog.duckdb", read_only=True) as reader:
        put(store, ("a", 1), "generations", "k", {"generations": rows("generations", [{"sample_id": "s"}])})
        path = write_catalog(store)
        assert reader.execute("SELECT count(*) FROM generations").fetchall() == [(0,)]
    with duckdb.connect() as connection:
        connection.execute(f"ATTACH '{path}' AS catalog (READ_ONLY)")
        assert connection.execute("SELECT count(*) FROM catalog.samples").fetchall() == [(1,)]
    assert [p.name for p in store.local.iterdir() if p.is_file()] == ["catalog.duckdb"]


def test_sixty_cells_open(store: ArtifactStore) -> None:
    for number in range(60):
        for stage, tables in STAGES.items():
            frames = {table: rows(table, [{}]) for table in tables}
            put(store, (f"exp{number % 3}", number // 3 + 1), stage, f"k{number}", frames)
    with connect(store) as connection:
        assert connection.execute("SELECT count(*) FROM generations").fetchall() == [(60,)]
