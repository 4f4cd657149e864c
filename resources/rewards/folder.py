"""Where a scoring model's files are: a local folder, or one fetched from the hub."""

from __future__ import annotations

from pathlib import Path

from textalign_dagster.hub import MODEL_FILES, snapshot
from textalign_dagster.settings import SettingsError

UNSAFE_FILES = ("pytorch_model*.bin",)


def find_folder(model: str, revision: str | None, field: str, *, unsafe: bool = False) -> Path:
    """The folder of a model.

    Args:
        model: an absolute path, or a hub id.
        field: for errors, e.g. ``model``.
        unsafe: whether to fetch weights in PyTorch's own format too (they are read as tensors only).

    Raises:
        SettingsError: there is no such folder, or the hub does not provide it.
    """
    path = Path(model)
    if path.is_absolute():
        if not path.is_dir():
            raise SettingsError(f"{field}: {path}: no such folder")
        return path
    if model.count("/") != 1 or model.startswith("."):
        raise SettingsError(f"{field}: {model!r} is neither a folder nor a hub id such as owner/model")
    return snapshot(field, model, revision, [*MODEL_FILES, *(UNSAFE_FILES if unsafe else ())])
