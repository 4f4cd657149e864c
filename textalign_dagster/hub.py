"""Snapshots of models and datasets from the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from textalign_dagster.settings import SettingsError

MODEL_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")


def snapshot(
    field: str,
    repository: str,
    revision: str | None,
    patterns: Sequence[str],
    *,
    kind: Literal["model", "dataset"] = "model",
    instead: str = "give a local folder",
) -> Path:
    """The local folder of a repository's files; those not cached yet are downloaded.

    Args:
        field: the experiment's field, for error messages.
        patterns: globs of the files to download.
        instead: for error messages, the alternative to the hub.

    Raises:
        SettingsError: the download fails.
    """
    # Imported here: only hub ids need it, and loading the code location must stay light.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            repository, repo_type=kind, revision=revision, allow_patterns=list(patterns)
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise SettingsError(
            f"{field}: {repository} cannot be loaded from the hub ({type(error).__name__}); check the name, the "
            f"revision, the network and your login, or {instead}"
        ) from None
    return Path(folder)
