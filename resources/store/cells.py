"""Cells of the grid: which artifact is the output of (experiment, iteration, stage)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import polars as pl

from resources.store.artifact import Artifact
from resources.store.attempts import check_name
from resources.store.durable import ArtifactError
from resources.store.manifest import decode
from resources.store.storage import Storage

CELLS = pl.Schema(
    {
        "experiment": pl.String(),  # primary key, with iteration and stage
        "iteration": pl.Int32(),  # 0: the untouched base policy
        "stage": pl.String(),
        "key": pl.String(),  # the artifact
        "reused": pl.Boolean(),  # false: this cell paid for the artifact
        "passed": pl.Boolean(),  # whether all checks passed; NULL without checks
        "checks": pl.String(),  # JSON: check → passed
        "settings": pl.String(),  # JSON: the settings this cell was computed with
        "assigned_at": pl.Datetime("ms", "UTC"),
    }
)
POINTER_FIELDS = (
    "format",
    "experiment",
    "iteration",
    "stage",
    "key",
    "reused",
    "checks",
    "settings",
    "inputs",
    "assigned_at",
)


@dataclass(frozen=True)
class Pointer:
    """The output of one stage of one cell."""

    experiment: str
    iteration: int
    stage: str
    artifact: Artifact
    settings: Mapping[str, Any]
    checks: Mapping[str, bool]
    inputs: Mapping[str, str]  # the artifact's: name → key
    reused: bool  # false: this cell paid for the artifact
    assigned_at: datetime


def pointer_path(experiment: str, iteration: int, stage: str) -> str:
    """The pointer's file, relative to the root.

    Raises:
        ArtifactError: a name that is not one plain path component, or a negative iteration.
    """
    check_name(experiment, "experiment")
    check_name(stage, "stage")
    if iteration < 0:
        raise ArtifactError(f"iteration {iteration}: iterations count from 0 (the base policy)")
    return f"cells/{experiment}/{iteration:03d}/{stage}.json"


def read_pointer(storage: Storage, path: str) -> dict[str, Any] | None:
    """The pointer's fields, or None if the file does not exist."""
    data = storage.read(path)
    return None if data is None else decode(data, storage.place(path), POINTER_FIELDS)


def cells_frame(pointers: Iterable[Mapping[str, Any]]) -> pl.DataFrame:
    """One row per pointer (`CELLS`), in the grid's order."""
    rows = [
        {
            **{name: pointer[name] for name in ("experiment", "iteration", "stage", "key", "reused")},
            "passed": all(pointer["checks"].values()) if pointer["checks"] else None,
            "checks": json.dumps(pointer["checks"], sort_keys=True),
            "settings": json.dumps(pointer["settings"], sort_keys=True),
            "assigned_at": datetime.fromisoformat(pointer["assigned_at"]),
        }
        for pointer in pointers
    ]
    return pl.DataFrame(rows, schema=CELLS).sort("experiment", "iteration", "stage")
