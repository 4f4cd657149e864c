"""Content hashes and derived seeds: how everything here is named and drawn.

An id is a hash of what the thing *is*, so a rerun yields the same id, repeats of a prompt stay
distinct (their draw differs), and tables of several rounds or experiments can be joined and pooled.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ID_BYTES = 12  # 96 bits: a collision among 10^9 rows has probability below 10^-11


def canonical_json(value: Any) -> str:
    """The canonical JSON text of a value: sorted keys, no whitespace, floats by ``repr``; NaN raises ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def content_hash(*parts: Any) -> str:
    """Hex digest (24 characters) of JSON-like parts; the boundaries between parts matter."""
    text = canonical_json(list(parts))
    return hashlib.blake2b(text.encode(), digest_size=ID_BYTES).hexdigest()


def derive_seed(*parts: Any) -> int:
    """A seed in ``[0, 2**63)`` derived from JSON-like parts, e.g. (seed, iteration, prompt, draw)."""
    digest = hashlib.blake2b(canonical_json(["seed", *parts]).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def folder_hash(folder: Path, names: Sequence[str]) -> str:
    """Hex digest of some of a folder's files (relative names and bytes); their order does not matter."""
    digest = hashlib.blake2b(digest_size=ID_BYTES)
    for path in sorted(folder / name for name in names):
        digest.update(str(path.relative_to(folder)).encode() + b"\0")
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def settings_diff(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Lines ``section.field: old -> new`` for every difference between two nested settings."""
    lines: list[str] = []
    for key in sorted({*old, *new}):
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += settings_diff(before, after, f"{prefix}{key}.")
        else:
            lines.append(f"{prefix}{key}: {before!r} -> {after!r}")
    return lines
