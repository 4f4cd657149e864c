"""Where a scoring model's files are: a local folder, or one fetched from the hub."""

from __future__ import annotations

from pathlib import Path

from textalign_dagster.settings import SettingsError

PATTERNS = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
UNSAFE_PATTERNS = ("pytorch_model*.bin",)


def find_folder(model: str, revision: str | None, field: str, *, unsafe: bool = False) -> Path:
    """The folder of a model.

    Args:
        model: an absolute path, or a hub id.
        field: for errors, e.g. ``model``.
        unsafe: whether weights in PyTorch's own format are wanted too (they are read as tensors only).

    Raises:
        SettingsError: there is no such folder, or the hub does not give it.
    """
    path = Path(model)
    if path.is_absolute():
        if not path.is_dir():
            raise SettingsError(f"{field}: {path}: no such folder")
        return path
    if model.count("/") != 1 or model.startswith("."):
        raise SettingsError(f"{field}: {model!r} is no folder and no hub id such as owner/model")
    # Imported here: only hub models need it, and loading the code location must stay light.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    patterns = [*PATTERNS, *(UNSAFE_PATTERNS if unsafe else ())]
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise SettingsError(
            f"{field}: {model} cannot be had from the hub ({type(error).__name__}); check the name, the revision, "
            "the network and your login, or give a local folder"
        ) from None
