"""What may import what: arrows between rooms go one way, and the tree says what lives where."""

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
"""Rooms and modules of textalign_dagster that import neither resources nor assets."""
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
"""The rooms of resources, and the rooms (and modules beside them) that each imports, and no others."""
TRAINING = ("job", "settings", "acceleration", "state.snapshot_folder", "objectives", "data.batches")
"""What others import of training: plain data, without torch. (`objectives` are settings until they are called.)"""


def modules() -> dict[str, Path]:
    found = {}
    for package in PACKAGES:
        for path in sorted((PROJECT / package).rglob("*.py")):
            parts = path.relative_to(PROJECT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> set[str]:
    """The modules of the project that a file imports, anywhere in it."""
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


def room(name: str) -> str:
    """resources.store.cells → resources.store; a module at the root of a package is a room of its own."""
    return ".".join(name.split(".")[:2])


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The first circle found below each node, if any."""
    state: dict[str, int] = {}
    found: list[list[str]] = []

    def visit(node: str, path: list[str]) -> None:
        state[node] = 1
        for other in sorted(graph.get(node, ())):
            if state.get(other) == 1:
                found.append([*path[path.index(other) :], other])
            elif other not in state:
                visit(other, [*path, other])
        state[node] = 2

    for node in sorted(graph):
        if node not in state:
            visit(node, [node])
    return found


def test_no_circles_between_rooms() -> None:
    graph: dict[str, set[str]] = defaultdict(set)
    for name, others in IMPORTS.items():
        graph[room(name)] |= {room(other) for other in others} - {room(name)}
    assert circles(graph) == []


def test_no_circles_between_modules() -> None:
    # A package that gathers its modules is imported by name only from outside.
    graph = {
        name: {other for other in others if not name.startswith(f"{other}.")}
        for name, others in IMPORTS.items()
    }
    assert circles(graph) == []


@pytest.mark.parametrize("name", RESOURCES)
def test_arrows_within_resources(name: str) -> None:
    here = f"resources.{name}"
    found = {
        room(other).removeprefix("resources.")
        for module, others in IMPORTS.items()
        if room(module) == here
        for other in others
        if other.startswith("resources.") and room(other) != here
    }
    assert found <= set(RESOURCES[name])


def test_the_core_imports_no_resources() -> None:
    for module, others in IMPORTS.items():
        if module.startswith("textalign_dagster.") and module.split(".")[1] in CORE:
            assert not {other for other in others if other.startswith(("resources", "assets"))}, module


def test_only_plain_data_of_training_is_imported_from_outside() -> None:
    allowed = tuple(f"training.{name}" for name in TRAINING)
    for module, others in IMPORTS.items():
        if not module.startswith("training"):
            foreign = {other for other in others if other.startswith("training.")}
            assert {other for other in foreign if not other.startswith(allowed)} == set(), module


def test_every_room_says_what_lives_in_it() -> None:
    for name, path in MODULES.items():
        if path.name == "__init__.py" and name not in PACKAGES:
            assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), name


def test_methods_and_objectives_are_known_to_their_registries_only() -> None:
    """Stages and trainer never ask which method or objective it is."""
    for kind in ("textalign_dagster.methods", "training.objectives"):
        own = {name for name in MODULES if name.startswith(f"{kind}.")} - {
            f"{kind}.base",
            f"{kind}.tokens",
            f"{kind}.pairs",
        }
        for module, others in IMPORTS.items():
            if not module.startswith(kind) and module.startswith(("assets", "training", "resources")):
                assert not others & own, module
