"""The base policy of an experiment: shipped with the task, a local folder, or on the hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from textalign_dagster.experiment import Experiment, Policy
from textalign_dagster.ids import folder_hash
from textalign_dagster.settings import SettingsError, nearest

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class BasePolicy:
    """A transformers folder and the hash of what decides its samples."""

    path: Path
    policy_hash: str


def base_policy(experiment: Experiment) -> BasePolicy:
    """The policy iteration 1 samples from.

    Raises:
        SettingsError: there is no such model, or its folder cannot be used; says what is missing.
    """
    settings = experiment.policy
    shipped = experiment.task.builtin_policy(settings.model)
    if shipped is not None:
        return _local(Path(shipped))
    path = Path(settings.model)
    if path.is_absolute():
        return _local(path)
    if settings.model.count("/") != 1:
        known = experiment.task.builtin_policies
        raise SettingsError(
            f"policy.model: {settings.model!r} is no policy of task {experiment.task.name}"
            f"{nearest(settings.model, known)} (it ships: {', '.join(known) or 'none'}), no folder and no "
            "hub id such as owner/model"
        )
    return _local(_from_hub(settings))


def policy_hash(folder: Path) -> str:
    """Hash of a policy's weights, config and tokenizer (not of its README).

    Raises:
        SettingsError: the folder is no transformers model with safetensors weights.
    """
    return folder_hash(folder, _files(folder))


def _local(folder: Path) -> BasePolicy:
    stamps = tuple(
        (name, (folder / name).stat().st_mtime_ns, (folder / name).stat().st_size) for name in _files(folder)
    )
    return BasePolicy(folder, _hashed(folder, stamps))


@lru_cache(maxsize=64)
def _hashed(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    return folder_hash(folder, [name for name, _, _ in stamps])


def _files(folder: Path) -> list[str]:
    if not folder.is_dir():
        raise SettingsError(f"policy.model: {folder}: no such folder")
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(
            f"policy.model: {folder} has no config.json; give a folder saved by save_pretrained"
        ) from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"policy.model: {folder}/config.json cannot be read: {error}") from None
    if "model_type" not in config:
        raise SettingsError(f"policy.model: {folder}/config.json names no model_type")
    if not any(name in names for name in WEIGHTS):
        raise SettingsError(
            f"policy.model: {folder} has no {WEIGHTS[0]}; only safetensors weights are read "
            "(convert others with save_pretrained)"
        )
    for name in names:
        if name.endswith(".safetensors"):
            _check_weights(folder / name)
    if WEIGHTS[1] in names and WEIGHTS[0] not in names:
        _check_shards(folder, names)
    if not any(name in names for name in TOKENIZERS):
        raise SettingsError(
            f"policy.model: {folder} has no tokenizer ({', '.join(TOKENIZERS)}); save the model's there"
        )
    kept = (".json", ".safetensors", ".model", ".txt", ".jinja")
    return [n for n in names if n.endswith(kept) and n not in ("provenance.json", "done.json")]


def _check_weights(path: Path) -> None:
    """Reads the header only: a pointer of Git LFS or half a download is found before anything starts."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if length <= size - 8 else b""
    try:
        tensors = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise SettingsError(
            f"policy.model: {path} is no safetensors file (a Git LFS pointer?); fetch it again"
        ) from None
    if end != size:
        raise SettingsError(
            f"policy.model: {path} is cut short ({size:,} bytes instead of {end:,}); fetch it again"
        )


def _check_shards(folder: Path, names: list[str]) -> None:
    try:
        index = json.loads((folder / WEIGHTS[1]).read_text(encoding="utf-8"))
        missing = sorted(set(index["weight_map"].values()) - set(names))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise SettingsError(f"policy.model: {folder}/{WEIGHTS[1]} cannot be read; fetch it again") from None
    if missing:
        raise SettingsError(f"policy.model: {folder} lacks {', '.join(missing)}; fetch them again")


def _from_hub(settings: Policy) -> Path:
    # Imported here: only hub models need it, and loading the code location must stay light.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            settings.model,
            revision=settings.revision,
            allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"],
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise SettingsError(
            f"policy.model: {settings.model} cannot be had from the hub "
            f"({type(error).__name__}); check the name, the revision, the network and your login, "
            "or give a local folder"
        ) from None
    return Path(folder)
