"""Checks free disk space before a run starts."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from resources.store import ArtifactStore
from textalign_dagster.experiment.files import Library, home
from textalign_dagster.experiment.policies import base_policy
from textalign_dagster.settings import SettingsError

HISTORY = 20 * 2**20
"""Bytes for Dagster's history, logs and tables of a few iterations; tables of large experiments need more."""


def check_space(library: Library, names: Sequence[str], iterations: int | None, store: ArtifactStore) -> None:
    """Refuses a run that would run out of disk space.

    Counts Dagster's history and the weights of each checkpoint still to be trained (with AdamW's moments if
    they are carried over), one of them twice: a snapshot or draft exists alongside it for a while.

    Raises:
        SettingsError: there is too little space; the message names the folder, and the space free and needed.
    """
    weights = 0
    for name in names:
        experiment = library.load(name)
        last = min(iterations or experiment.iterations, experiment.iterations)
        missing = sum(store.pointer(name, k, "checkpoint") is None for k in range(1, last + 1))
        size = sum(file.stat().st_size for file in base_policy(experiment).path.glob("*.safetensors"))
        carried = 3 if experiment.training.optimizer_state == "carried" else 1
        weights += size * carried * (missing + 1) if missing else 0
    needed = {home(): HISTORY}
    needed[store.local] = needed.get(store.local, 0) + weights
    by_disk: dict[int, list[tuple[Path, int]]] = {}
    for folder, size in needed.items():
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        by_disk.setdefault(existing.stat().st_dev, []).append((existing, size))
    for places in by_disk.values():
        (folder, _), required = places[0], sum(size for _, size in places)
        free = shutil.disk_usage(folder).free
        if free < required:
            raise SettingsError(
                f"{folder}: {free / 2**20:.1f} MiB free, and the run needs about {required / 2**20:.0f} MiB; free some "
                "space, or set TEXTALIGN_HOME (and TEXTALIGN_STORE) to a larger disk"
            )
