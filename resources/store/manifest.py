"""The manifest: it makes an artifact exist, and records its full provenance."""

from __future__ import annotations

import hashlib
import json
import platform
import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from resources.store.durable import ArtifactError
from resources.store.provenance import code_revision, environment, environment_hash
from textalign_dagster.settings import SECRET_NAME

FORMAT = 1
REQUIRED = (
    "format",
    "stage",
    "key",
    "attempt",
    "inputs",
    "settings",
    "files",
    "folders",
    "created_at",
)

SECRET_URL = re.compile(r"://[^/@\s]*:[^/@\s]+@")


def build(
    *,
    stage: str,
    key: str,
    attempt: str,
    inputs: Mapping[str, str],
    settings: Mapping[str, Any],
    versions: Mapping[str, Any],
    seed: int | None,
    seconds: float,
    facts: Mapping[str, Any],
    files: list[dict[str, Any]],
    folders: list[str],
) -> dict[str, Any]:
    """The manifest of an artifact about to be published.

    ``seconds`` is the wall time of computing it; ``facts`` is what the stage recorded (usd, tokens,
    …); each of ``files`` has path (relative to the attempt), bytes, sha256, and for tables
    ``table``, ``rows`` and ``columns`` (name → polars type).
    """
    return {
        "format": FORMAT,
        "stage": stage,
        "key": key,
        "attempt": attempt,
        "inputs": dict(inputs),
        "settings": dict(settings),
        "versions": dict(versions),
        "seed": seed,
        "code_revision": code_revision(),
        "environment": environment(),
        "environment_hash": environment_hash(),
        "host": platform.node(),
        "created_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "seconds": round(seconds, 3),
        "facts": dict(facts),
        "files": files,
        "folders": folders,
    }


def encode(value: Mapping[str, Any]) -> bytes:
    """Readable JSON, sorted; plain data only."""
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False).encode()


def decode(data: bytes, place: str, required: tuple[str, ...] = REQUIRED) -> dict[str, Any]:
    """A manifest or pointer read back.

    Raises:
        ArtifactError: not JSON, not an object, a field missing, or another format.
    """
    try:
        value = json.loads(data)
    except ValueError as error:
        raise ArtifactError(f"{place} is not readable JSON ({error}): remove it and run again") from error
    missing = [f for f in required if f not in value] if isinstance(value, dict) else list(required)
    if missing:
        raise ArtifactError(
            f"{place} was not written by this project (no {', '.join(missing)}): remove it and run again"
        )
    if value["format"] != FORMAT:
        raise ArtifactError(
            f"{place} has format {value['format']!r}, this version reads {FORMAT}: "
            "use the version that wrote it"
        )
    return dict(value)


def file_facts(folder: Path, path: Path) -> dict[str, Any]:
    """Path, size and content hash of one file of an attempt."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "path": path.relative_to(folder).as_posix(),
        "bytes": path.stat().st_size,
        "sha256": digest,
    }


def damages(manifest: Mapping[str, Any], sizes: Mapping[str, int]) -> list[str]:
    """What is wrong with an artifact's files, given the sizes found by path in the attempt."""
    found = []
    for file in manifest["files"]:
        size = sizes.get(file["path"])
        if size is None:
            found.append(f"{file['path']} is missing")
        elif size != file["bytes"]:
            found.append(f"{file['path']} has {size} bytes instead of {file['bytes']}")
    return found


def check_plain(value: Mapping[str, Any], what: str) -> None:
    """Reject what cannot or must not be recorded: NaN, objects, and anything that looks like a secret.

    Raises:
        ArtifactError: names the field.
    """
    for field, item in _leaves(value, what):
        name = field.rsplit(".", 1)[-1]
        if isinstance(item, str) and item and (SECRET_NAME.search(name) or SECRET_URL.search(item)):
            raise ArtifactError(
                f"{field} looks like a secret, and manifests must not hold secrets: "
                "name the environment variable that holds it instead (e.g. api_key_env)"
            )
        try:
            json.dumps(item, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ArtifactError(f"{field} cannot be recorded ({error}): use plain JSON values") from error


def _leaves(value: Any, field: str) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [leaf for k, v in value.items() for leaf in _leaves(v, f"{field}.{k}")]
    if isinstance(value, list | tuple):
        return [leaf for item in value for leaf in _leaves(item, field)]
    return [(field, value)]
