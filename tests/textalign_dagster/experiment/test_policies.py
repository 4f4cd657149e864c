"""Base policies: found and hashed by what affects samples, or rejected with what is missing."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.toy import environment, textalign
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.policies import base_policy, policy_hash
from textalign_dagster.settings import SettingsError, validate

SHIPPED = "pep8-sloppy-1m"


def experiment(model: str) -> Experiment:
    content = {"task": "pep8", "method": "quark", "policy": {"model": model}}
    result: Experiment = validate(Experiment, content, "x")
    return result


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the shipped policy."""
    copy = tmp_path / "model"
    shutil.copytree(base_policy(experiment(SHIPPED)).path, copy)
    return copy


def test_shipped_policy_and_a_copy_have_the_same_hash(folder: Path) -> None:
    shipped, copy = base_policy(experiment(SHIPPED)), base_policy(experiment(str(folder)))
    assert shipped.policy_hash == copy.policy_hash == policy_hash(folder)
    assert copy.path == folder


def test_hash_covers_only_what_affects_samples(folder: Path) -> None:
    before = policy_hash(folder)
    (folder / "README.md").write_text("other words")
    (folder / "done.json").write_text("{}")
    (folder / "provenance.json").write_text("{}")
    (folder / ".cache").mkdir()
    assert policy_hash(folder) == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rope_theta": 1.5}))
    assert policy_hash(folder) != before


def test_replaced_weight_file_is_detected(folder: Path) -> None:
    before = base_policy(experiment(str(folder))).policy_hash
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    os.utime(weights, ns=(1, 1))
    assert base_policy(experiment(str(folder))).policy_hash != before


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: (f / "config.json").unlink(), "has no config.json; give a folder saved by save_pretrained"),
        (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read: "),
        (lambda f: (f / "config.json").write_bytes(b"\xff"), "config.json cannot be read: "),
        (lambda f: (f / "config.json").write_text("[]"), "config.json names no model_type"),
        (lambda f: (f / "config.json").write_text("{}"), "config.json names no model_type"),
        (lambda f: (f / "model.safetensors").unlink(), "has no model.safetensors; only safetensors weights are read"),
        (lambda f: (f / "model.safetensors").write_bytes(b""), "model.safetensors is not a safetensors file"),
        (
            lambda f: (f / "model.safetensors").write_bytes(b"version https://git-lfs"),
            "model.safetensors is not a safetensors file",
        ),
        (lambda f: (f / "tokenizer.json").unlink(), "has no tokenizer (tokenizer.json, tokenizer.model, vocab.json)"),
    ],
)  # fmt: skip
def test_unusable_folder_reports_what_is_missing(folder: Path, spoil: object, message: str) -> None:
    spoil(folder)  # type: ignore[operator]
    with pytest.raises(SettingsError) as caught:
        base_policy(experiment(str(folder)))
    assert message in str(caught.value)
    assert str(caught.value).startswith("policy.model: ")
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_truncated_weight_file(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(SettingsError, match="is cut short"):
        base_policy(experiment(str(folder)))


def test_unknown_model_name() -> None:
    with pytest.raises(SettingsError) as caught:
        base_policy(experiment("pep8-slopy-1m"))
    assert str(caught.value) == (
        "policy.model: 'pep8-slopy-1m' is not a policy of task pep8 (did you mean 'pep8-sloppy-1m'?) "
        "(it ships: pep8-sloppy-1m), nor a folder, nor a hub id such as owner/model"
    )


def test_hub_model_that_cannot_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SettingsError, match=r"policy\.model: owner/model cannot be loaded from the hub"):
        base_policy(experiment("owner/model"))


def test_hub_model_is_read_from_the_hub_cache(home: Path, toys: Path, tmp_path: Path) -> None:
    """The hub's own folder layout, without the hub: refs name a commit, snapshots hold its files."""
    cache = tmp_path / "hub" / "models--someone--sloppy"
    commit = "0123456789abcdef0123456789abcdef01234567"
    snapshot = cache / "snapshots" / commit
    snapshot.parent.mkdir(parents=True)
    shutil.copytree(base_policy(experiment(SHIPPED)).path, snapshot)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(commit, encoding="utf-8")
    env = environment(home, toys) | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    output = textalign("validate", "toy", "--set", "policy.model=someone/sloppy", env=env, fork=False).stdout
    assert f"base policy: {snapshot}" in output
    missing = textalign(
        "validate", "toy", "--set", "policy.model=someone/else", env=env, ok=False, fork=False
    ).stderr
    assert "someone/else" in missing and "hub" in missing
