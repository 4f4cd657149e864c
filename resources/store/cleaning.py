"""Removing what killed processes left in a store."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

from resources.store.artifact import artifact_folder, read_manifest
from resources.store.attempts import NAME, sweep, sweep_temporary
from resources.store.storage import LocalStorage, Storage

REMOTE_LEFTOVER = timedelta(days=1)  # object stores have no locks: only age shows what is abandoned


def clean(storage: Storage, local: Path, older_than: timedelta) -> list[str]:
    """Sweep every artifact's folder and the temporary files of cells and catalog; returns what was removed."""
    removed: list[str] = []
    keys = {(folder.parent.name, folder.name) for folder in local.glob("artifacts/*/*/")}
    if not isinstance(storage, LocalStorage):
        paths = [path.split("/") for path in storage.entries("artifacts")]
        keys |= {(path[1], path[2]) for path in paths if len(path) > 3}
    for stage, key in sorted(keys):
        removed += sweep_artifact(storage, local, stage, key, older_than)
    for folder in [local, *local.glob("cells/*/*")]:
        if folder.is_dir():
            names = {entry.name for entry in folder.iterdir()}
            removed += [str(path) for path in sweep_temporary(folder, names)]
    return removed


def sweep_artifact(
    storage: Storage, local: Path, stage: str, key: str, older_than: timedelta = REMOTE_LEFTOVER
) -> list[str]:
    """Remove dead attempts at one artifact; returns their paths or URLs."""

    def published() -> str | None:
        manifest = read_manifest(storage, stage, key)
        return None if manifest is None else str(manifest["attempt"])

    parent = artifact_folder(stage, key)
    removed = [str(path) for path in sweep(local / parent, published)]
    if isinstance(storage, LocalStorage):
        return removed
    newest: dict[str, datetime] = {}
    for path, (_, written) in storage.entries(parent).items():
        name = path.split("/")[3]
        newest[name] = max(written, newest.get(name, written))
    for name, written in newest.items():
        old = datetime.now(UTC) - written > older_than
        if old and NAME.fullmatch(name) and name != published():
            storage.remove(f"{parent}/{name}")
            removed.append(storage.place(f"{parent}/{name}"))
    return removed
