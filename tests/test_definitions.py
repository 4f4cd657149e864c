"""The contents of the code location, as plain literals, and import rules."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest

from assets.columns import columns_of
from textalign_dagster import tables
from textalign_dagster.definitions import defs

PROJECT = Path(__file__).resolve().parent.parent
CORE = sorted((PROJECT / "textalign_dagster").rglob("*.py"))
WITH_DAGSTER = {"partitions", "definitions", "automation", "checks", "running", "abandoned"}

DEPENDENCIES = {
    "policy": [],
    "prompt_draws": [],
    "generations": ["policy", "prompt_draws"],
    "feedback": ["generations"],
    "datapool": ["feedback"],
    "checkpoint": ["datapool"],
    "evaluation": ["checkpoint"],
}
CHECKS = {
    ("prompt_draws", "schema"): "blocks",
    ("generations", "schema"): "blocks",
    ("generations", "not_empty"): "blocks",
    ("generations", "not_duplicated"): "blocks",
    ("generations", "conditioned_once"): "blocks",
    ("feedback", "schema"): "blocks",
    ("feedback", "usable"): "blocks",
    ("feedback", "judge_model"): "warns",
    ("feedback", "length_correlation"): "warns",
    ("datapool", "schema"): "blocks",
    ("datapool", "balance"): "warns",
    ("datapool", "conditioned_once"): "blocks",
    ("evaluation", "schema"): "blocks",
    ("evaluation", "diversity"): "blocks",
}


def test_definitions_load() -> None:
    dg.Definitions.validate_loadable(defs)


def test_assets_and_dependencies() -> None:
    graph = defs.resolve_asset_graph()
    dependencies = {
        node.key.to_user_string(): sorted(key.to_user_string() for key in node.parent_keys)
        for node in graph.asset_nodes
    }
    assert dependencies == DEPENDENCIES
    assert {node.group_name for node in graph.asset_nodes} == {"loop"}
    assert [node.key.to_user_string() for node in graph.asset_nodes if node.is_external] == ["policy"]
    # Identity dependencies on one grid: anything else makes backfills run out of order.
    assert len({id(node.partitions_def) for node in graph.asset_nodes}) == 1
    assert all(not node.partition_mappings for node in graph.asset_nodes)
    assert {node.key.to_user_string(): node.pools for node in graph.asset_nodes if node.pools} == {
        "generations": {"gpu"},
        "checkpoint": {"gpu"},
        "evaluation": {"gpu"},
    }


def test_checks_and_whether_they_block() -> None:
    nodes = defs.resolve_asset_graph().asset_check_nodes
    checks = {
        (node.key.asset_key.to_user_string(), node.key.name): "blocks" if node.blocking else "warns"
        for node in nodes
    }
    assert checks == CHECKS
    assert all(node.partitions_def is not None for node in nodes)


def test_jobs_schedules_and_sensors() -> None:
    repository = defs.get_repository_def()
    jobs = {job.name for job in repository.get_all_jobs() if not job.name.startswith("__")}
    assert jobs == {"iteration"}
    job = repository.get_job("iteration")
    assert {key.to_user_string() for key in job.asset_layer.executable_asset_keys} == DEPENDENCIES.keys() - {
        "policy"
    }
    assert {schedule.name: schedule.cron_schedule for schedule in repository.schedule_defs} == {
        "next_iteration": "0 2 * * *"
    }
    assert [sensor.name for sensor in repository.sensor_defs] == ["advance", "collect_batches"]
    # Nothing runs until someone turns it on.
    assert {i.default_status.value for i in (*repository.schedule_defs, *repository.sensor_defs)} == {
        "STOPPED"
    }


@pytest.mark.parametrize("name", [n for n, v in vars(tables).items() if isinstance(v, tables.pl.Schema)])
def test_every_column_has_a_description(name: str) -> None:
    schema = vars(tables)[name]
    if "measures" not in schema:  # the per-sample table has no page of its own
        described = columns_of(schema)["dagster/column_schema"]
        assert all(column.description for column in described.columns)


def test_every_asset_has_a_description_and_kinds() -> None:
    for node in defs.resolve_asset_graph().asset_nodes:
        assert node.description and node.kinds, node.key


def test_location_loads_without_heavy_libraries_and_without_noise() -> None:
    heavy = ["torch", "transformers", "accelerate", "vllm", "matplotlib", "datasets", "openai"]
    code = f"""
import sys
import textalign_dagster.definitions
import assets, resources, training
print([name for name in {heavy} if name in sys.modules])
print(assets.__path__[0], resources.__path__[0], training.__path__[0], sep="\\n")
"""
    done = subprocess.run(
        [sys.executable, "-W", "default", "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    loaded, *folders = done.stdout.splitlines()
    assert loaded == "[]"
    assert folders == [str(PROJECT / name) for name in ("assets", "resources", "training")]
    noise = [line for line in done.stderr.splitlines() if "Warning" in line and str(PROJECT) in line]
    assert noise == []


@pytest.mark.parametrize("path", CORE, ids=lambda path: path.stem)
def test_core_does_not_import_dagster(path: Path) -> None:
    imports = _imports(path)
    if path.stem not in WITH_DAGSTER:
        assert "dagster" not in imports
    if path.stem not in ("running", "cli"):
        assert "textalign_dagster.definitions" not in imports


@pytest.mark.parametrize("folder", ["assets", "resources", "training"])
def test_imports_go_one_way(folder: str) -> None:
    for path in sorted((PROJECT / folder).rglob("*.py")):
        imports = _imports(path)
        assert "textalign_dagster.definitions" not in imports, path
        if folder == "training":
            assert "dagster" not in imports and "assets" not in imports and "resources" not in imports, path
        if folder == "resources":
            assert "assets" not in imports, path


def _imports(path: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, and their top-level packages."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names | {name.partition(".")[0] for name in names}
