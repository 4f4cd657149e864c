"""The models of an experiment (base policy, baselines, fluency): shipped, a local folder, or on the hub."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from textalign_dagster.experiment.experiment import REFERENCES, Experiment
from textalign_dagster.hub import MODEL_FILES, snapshot
from textalign_dagster.ids import folder_hash
from textalign_dagster.settings import SettingsError, nearest

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class BasePolicy:
    """A transformers folder and the hash of the files that determine its samples."""

    path: Path
    policy_hash: str


def base_policy(experiment: Experiment) -> BasePolicy:
    """The policy iteration 1 samples from.

    Raises:
        SettingsError: there is no such model, or its folder cannot be used; the message names what is missing.
    """
    return find_model(experiment, experiment.policy.model, "policy.model", experiment.policy.revision)


def fluency_model(experiment: Experiment) -> BasePolicy:
    """The model under which an evaluation's samples get their perplexity; raises as :func:`base_policy`."""
    name = experiment.evaluation.fluency_model
    if name is None:
        return base_policy(experiment)
    return find_model(experiment, name, "evaluation.fluency_model")


def kl_reference(experiment: Experiment) -> BasePolicy | None:
    """The reference of an evaluation's KL; None: it is not measured. Raises as :func:`base_policy`."""
    name = experiment.evaluation.kl_reference
    return None if name is None else _base_or(experiment, name, "evaluation.kl_reference")


def red_team_model(experiment: Experiment) -> BasePolicy:
    """The model that writes prompts in an evaluation's red-teaming. Raises as :func:`base_policy`."""
    assert experiment.evaluation.red_team is not None, "evaluation.red_team is not set"
    return _base_or(experiment, experiment.evaluation.red_team.model, "evaluation.red_team.model")


def _base_or(experiment: Experiment, model: str, field: str) -> BasePolicy:
    """The base policy if ``model`` is "base", else the model of that name."""
    return base_policy(experiment) if model == "base" else find_model(experiment, model, field)


def baselines(experiment: Experiment) -> dict[str, BasePolicy | None]:
    """The models evaluated alongside the policy, by name; None: the source's human answers.

    Raises:
        SettingsError: one is not available, or is listed twice; the message names it.
    """
    found: dict[str, BasePolicy | None] = {}
    for name, model in experiment.evaluation.baselines.items():
        field = f"evaluation.baselines.{name}"
        this = None if model == REFERENCES else find_model(experiment, model, field)
        hashes = {other and other.policy_hash: twin for twin, other in found.items()}
        twin = hashes.get(this and this.policy_hash)
        if twin is not None:
            raise SettingsError(f"{field}: the same model as {twin!r}; remove one of them")
        found[name] = this
    return found


def evaluation_models(experiment: Experiment) -> dict[str, str | None]:
    """Field → hash of each model that only the evaluation needs: they are known before it starts.

    Raises:
        SettingsError: one is not available; the message names its field.
    """
    found = {f"baselines.{name}": model for name, model in baselines(experiment).items()}
    if experiment.evaluation.fluency_model is not None:
        found["fluency_model"] = fluency_model(experiment)
    if experiment.evaluation.kl_reference is not None:
        found["kl_reference"] = kl_reference(experiment)
    if experiment.evaluation.red_team is not None:
        found["red_team.model"] = red_team_model(experiment)
    return {field: None if model is None else model.policy_hash for field, model in found.items()}


def find_model(experiment: Experiment, model: str, field: str, revision: str | None = None) -> BasePolicy:
    """The model that a field of the experiment names.

    Args:
        model: a policy shipped with the task, an absolute path, or a hub id.
        field: for errors, e.g. ``policy.model``.
        revision: of a hub model.

    Raises:
        SettingsError: there is no such model, or its folder cannot be used; the message names what is missing.
    """
    shipped = experiment.task.builtin_policy(model)
    if shipped is not None:
        return _local(Path(shipped), field)
    path = Path(model)
    if path.is_absolute():
        return _local(path, field)
    if model.count("/") != 1:
        known = experiment.task.builtin_policies
        raise SettingsError(
            f"{field}: {model!r} is not a policy of task {experiment.task.name}"
            f"{nearest(model, known)} (it ships: {', '.join(known) or 'none'}), nor a folder, nor a "
            "hub id such as owner/model"
        )
    return _local(snapshot(field, model, revision, MODEL_FILES), field)


def policy_hash(folder: Path) -> str:
    """Hash of a policy's weights, config and tokenizer (not of its README).

    Raises:
        SettingsError: the folder is not a transformers model with safetensors weights.
    """
    return folder_hash(folder, _files(folder, "policy.model"))


def _local(folder: Path, field: str) -> BasePolicy:
    stamps = tuple(
        (name, (folder / name).stat().st_mtime_ns, (folder / name).stat().st_size)
        for name in _files(folder, field)
    )
    return BasePolicy(folder, _hashed(folder, stamps))


@lru_cache(maxsize=64)
def _hashed(folder: Path, stamps: tuple[tuple[str, int, int], ...]) -> str:
    return folder_hash(folder, [name for name, _, _ in stamps])


def _files(folder: Path, field: str) -> list[str]:
    if not folder.is_dir():
        raise SettingsError(f"{field}: {folder}: no such folder")
    names = sorted(path.name for path in folder.iterdir() if path.is_file())
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(
            f"{field}: {folder} has no config.json; give a folder saved by save_pretrained"
        ) from None
    except (OSError, ValueError) as error:
        raise SettingsError(f"{field}: {folder}/config.json cannot be read: {error}") from None
    if "model_type" not in config:
        raise SettingsError(f"{field}: {folder}/config.json names no model_type")
    if not any(name in names for name in WEIGHTS):
        raise SettingsError(
            f"{field}: {folder} has no {WEIGHTS[0]}; only safetensors weights are read "
            "(convert others with save_pretrained)"
        )
    for name in names:
        if name.endswith(".safetensors"):
            _check_weights(folder / name, field)
    if WEIGHTS[1] in names and WEIGHTS[0] not in names:
        _check_shards(folder, names, field)
    if not any(name in names for name in TOKENIZERS):
        raise SettingsError(
            f"{field}: {folder} has no tokenizer ({', '.join(TOKENIZERS)}); save the model's tokenizer there"
        )
    kept = (".json", ".safetensors", ".model", ".txt", ".jinja")
    return [n for n in names if n.endswith(kept) and n not in ("provenance.json", "done.json")]


def _check_weights(path: Path, field: str) -> None:
    """Reads only the header: a Git LFS pointer or a partial download is detected before anything starts."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = stream.read(length) if length <= size - 8 else b""
    try:
        tensors = {k: v for k, v in json.loads(header).items() if k != "__metadata__"}
        end = 8 + length + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise SettingsError(
            f"{field}: {path} is not a safetensors file (a Git LFS pointer?); fetch it again"
        ) from None
    if end != size:
        raise SettingsError(
            f"{field}: {path} is cut short ({size:,} bytes instead of {end:,}); fetch it again"
        )


def _check_shards(folder: Path, names: list[str], field: str) -> None:
    try:
        index = json.loads((folder / WEIGHTS[1]).read_text(encoding="utf-8"))
        missing = sorted(set(index["weight_map"].values()) - set(names))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise SettingsError(f"{field}: {folder}/{WEIGHTS[1]} cannot be read; fetch it again") from None
    if missing:
        raise SettingsError(f"{field}: {folder} lacks {', '.join(missing)}; fetch them again")
