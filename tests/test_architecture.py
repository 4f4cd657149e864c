"""Import rules: dependencies between packages go one way, and every package documents its contents."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

from textalign_dagster import PROJECT

PACKAGES = ("textalign_dagster", "assets", "resources", "training")
CORE = (
    *(
        "settings",
        "pool",
        "methods",
        "scorers",
        "tasks",
        "judging",
        "feedback_files",
        "measures",
        "experiment",
        "loop",
    ),
    *("tables", "ids", "disk", "hub", "progress", "prompts", "tokenisation"),
)
"""Packages and modules of textalign_dagster that import neither resources nor assets."""
RESOURCES = {
    "store": (),
    "compute": (),
    "workers": ("compute",),
    "engines": ("store", "workers", "backoff"),
    "rewards": ("store", "workers"),
    "judges": ("store", "backoff"),
    "launchers": ("compute",),
    "views": ("store", "judges"),
}
"""The packages of resources, and the only sibling packages and modules that each may import."""
TRAINING = ("job", "settings", "acceleration", "state.snapshot_folder", "objectives", "data.batches")
"""What other packages may import from training: plain data, without torch. (`objectives` are settings until called.)"""


def modules() -> dict[str, Path]:
    paths = {}
    for package in PACKAGES:
        for path in sorted((PROJECT / package).rglob("*.py")):
            parts = path.relative_to(PROJECT).with_suffix("").parts
            paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return paths


MODULES = modules()


def imports(path: Path) -> set[str]:
    """The project's modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {
                full if (full := f"{node.module}.{alias.name}") in MODULES else node.module
                for alias in node.names
            }
    return names & MODULES.keys()


IMPORTS = {name: imports(path) for name, path in MODULES.items()}


def package_of(name: str) -> str:
    """resources.store.cells → resources.store; a module at the root of a top-level package stands for itself."""
    return ".".join(name.split(".")[:2])


def find_cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Cycles in a graph, at least one if there are any."""
    state: dict[str, int] = {}
    cycles: list[list[str]] = []

    def visit(node: str, path: list[str]) -> None:
        state[node] = 1
        for other in sorted(graph.get(node, ())):
            if state.get(other) == 1:
                cycles.append([*path[path.index(other) :], other])
            elif other not in state:
                visit(other, [*path, other])
        state[node] = 2

    for node in sorted(graph):
        if node not in state:
            visit(node, [node])
    return cycles


def test_no_import_cycles_between_packages() -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for name, others in IMPORTS.items():
        graph[package_of(name)] |= {package_of(other) for other in others} - {package_of(name)}
    assert find_cycles(graph) == []


def test_no_import_cycles_between_modules() -> None:
    # Imports of a module's own parent packages, which may re-export it, do not count.
    graph = {
        name: {other for other in others if not name.startswith(f"{other}.")}
        for name, others in IMPORTS.items()
    }
    assert find_cycles(graph) == []


@pytest.mark.parametrize("name", RESOURCES)
def test_imports_within_resources(name: str) -> None:
    package = f"resources.{name}"
    imported = {
        package_of(other).removeprefix("resources.")
        for module, others in IMPORTS.items()
        if package_of(module) == package
        for other in others
        if other.startswith("resources.") and package_of(other) != package
    }
    assert imported <= set(RESOURCES[name])


def test_core_imports_neither_resources_nor_assets() -> None:
    for module, others in IMPORTS.items():
        if module.startswith("textalign_dagster.") and module.split(".")[1] in CORE:
            assert not {other for other in others if other.startswith(("resources", "assets"))}, module


def test_only_plain_data_is_imported_from_training() -> None:
    allowed = tuple(f"training.{name}" for name in TRAINING)
    for module, others in IMPORTS.items():
        if not module.startswith("training"):
            foreign = {other for other in others if other.startswith("training.")}
            assert {other for other in foreign if not other.startswith(allowed)} == set(), module


def test_every_package_has_a_docstring() -> None:
    for name, path in MODULES.items():
        if path.name == "__init__.py" and name not in PACKAGES:
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name


def test_only_registries_import_methods_and_objectives() -> None:
    """Stages and the trainer never refer to a particular method or objective."""
    for kind in ("textalign_dagster.methods", "training.objectives"):
        own = {name for name in MODULES if name.startswith(f"{kind}.")} - {
            f"{kind}.base",
            f"{kind}.tokens",
            f"{kind}.pairs",
        }
        for module, others in IMPORTS.items():
            if not module.startswith(kind) and module.startswith(("assets", "training", "resources")):
                assert not others & own, module
