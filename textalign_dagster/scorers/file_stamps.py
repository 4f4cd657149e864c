"""Hashes of file contents, computed once for each state of the files."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path
from typing import Any

from textalign_dagster.ids import folder_hash

KEPT = (".json", ".safetensors", ".bin", ".model", ".txt", ".jinja", ".py")
"""Suffixes of the files of a model that its output depends on."""


def model_hash(folder: Path) -> str | None:
    """Hash of a model's weights, config and tokenizer; None if the folder does not exist."""
    try:
        names = sorted(p.name for p in folder.iterdir() if p.name.endswith(KEPT) and p.is_file())
    except OSError:
        return None
    return _hashed(folder, tuple(names), _stamps(folder, names))


def model_identity(field: str, model: str, revision: str | None) -> dict[str, Any]:
    """A model's identity: the content of a folder, else the hub id and revision."""
    folder = Path(model)
    if folder.is_absolute():
        return {field: model_hash(folder)}
    return {field: model, f"{field}_revision": revision}


def file_hash(path: Path) -> str | None:
    """Hash of a file's content, regardless of its name; None if the file does not exist."""
    if not path.is_file():
        return None
    return _content(path, _stamps(path.parent, [path.name]))


def tree_hash(folder: Path) -> str | None:
    """Hash of all files below a folder; None if it does not exist."""
    if not folder.is_dir():
        return None
    names = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    return _hashed(folder, tuple(names), _stamps(folder, names))


def _stamps(folder: Path, names: list[str]) -> tuple[tuple[int, int], ...]:
    states = [(folder / name).stat() for name in names]
    return tuple((state.st_mtime_ns, state.st_size) for state in states)


@lru_cache(maxsize=64)
def _hashed(folder: Path, names: tuple[str, ...], stamps: tuple[tuple[int, int], ...]) -> str:
    return folder_hash(folder, names)


@lru_cache(maxsize=256)
def _content(path: Path, stamps: tuple[tuple[int, int], ...]) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()[:24]
