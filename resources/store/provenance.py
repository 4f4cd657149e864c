"""Which code and package versions: determined once per process, recorded in manifests."""

from __future__ import annotations

import functools
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from textalign_dagster import PROJECT
from textalign_dagster.ids import content_hash

DISTRIBUTION = "textalign-dagster"
PACKAGES = (
    "accelerate",
    "dagster",
    "deepspeed",
    "duckdb",
    "numpy",
    "peft",
    "polars",
    "pyarrow",
    "pycodestyle",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
    "trl",
    "vllm",
)
"""Packages whose version can change what a stage computes."""


@functools.cache
def environment() -> dict[str, str]:
    """Versions of Python and of those of `PACKAGES` that are installed; nothing is imported."""
    found = {"python": platform.python_version()}
    for package in (DISTRIBUTION, *PACKAGES):
        installed = _version(package)
        if installed:
            found[package] = installed
    return found


@functools.cache
def environment_hash() -> str:
    """A hash of `environment`: equal hashes mean equal versions."""
    return content_hash("environment", environment())


@functools.cache
def code_revision() -> str:
    """The git commit of this checkout (``+changes``: tracked files differ), else the package's version."""
    top = _git("rev-parse", "--show-toplevel")
    commit = _git("rev-parse", "--verify", "HEAD")
    if commit and top and Path(top) == PROJECT:
        changed = _git("status", "--porcelain", "--untracked-files=no")
        return f"{commit}+changes" if changed else commit
    return _version(DISTRIBUTION) or "unknown"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(PROJECT), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None  # no git or no repository: fall back to the version
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
