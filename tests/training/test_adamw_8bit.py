"""AdamW with 8-bit moments: which moments are, their size, and that it trains like AdamW."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import training.state.model_folder
from tests.training.tiny import make_model, make_tokenizer, write_job
from training.train import main

pytest.importorskip("bitsandbytes", reason="the extra `8bit` is not installed")

SMALLEST = 4096  # smaller weights keep moments in full precision


@pytest.fixture
def wide(tmp_path: Path, job: dict[str, Any]) -> dict[str, Any]:
    """A job whose policy has matrices larger than that."""
    tokenizer = make_tokenizer()
    make_model(len(tokenizer), width=64).save_pretrained(tmp_path / "wide")
    tokenizer.save_pretrained(tmp_path / "wide")
    return job | {"policy": str(tmp_path / "wide")}


def train(
    folder: Path, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> tuple[list[float], dict[str, dict[str, Any]]]:
    """The losses, and the optimizer's state by the name of the weight."""
    states: dict[str, dict[str, Any]] = {}
    save = training.state.model_folder.save

    def record(trainer: Any, *others: Any) -> None:
        optimizer = trainer.optimizer.optimizer
        states.update({name: dict(optimizer.state[p]) for name, p in trainer.model.named_parameters()})
        save(trainer, *others)

    monkeypatch.setattr(training.state.model_folder, "save", record)
    job = job | {"training": job["training"] | settings}
    assert main([str(write_job(folder, job))]) == 0
    monkeypatch.setattr(training.state.model_folder, "save", save)
    return json.loads((Path(job["out"]) / "done.json").read_text())["losses"], states


def size(state: dict[str, Any]) -> int:
    return sum(x.numel() * x.element_size() for x in state.values() if isinstance(x, torch.Tensor))


def test_large_matrices_keep_their_moments_in_8_bits(
    tmp_path: Path, wide: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, full = train(tmp_path, wide, monkeypatch)
    losses, eighth = train(tmp_path, wide, monkeypatch, optimizer="adamw_8bit")
    assert losses != whole and losses == pytest.approx(whole, abs=0.02) and losses[-1] < losses[0] - 1
    assert full.keys() == eighth.keys()
    short = {name for name, state in eighth.items() if state["state1"].dtype == torch.uint8}
    # Embeddings keep theirs in full precision, as do small weights.
    expected = {
        name for name, state in full.items() if state["exp_avg"].numel() >= SMALLEST and "embed" not in name
    }
    assert short == expected != set()
    for name in short:
        # This includes the blocks' maxima and the two code books.
        assert size(eighth[name]) < 0.35 * size(full[name])


def test_training_with_adapters_and_packed_rows(
    tmp_path: Path, wide: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft", reason="the extra `lora` is not installed")
    settings: dict[str, Any] = {"optimizer": "adamw_8bit", "lora": {"rank": 64}, "packing": True}
    losses, states = train(tmp_path, wide, monkeypatch, **settings)
    assert losses[-1] < losses[0] - 0.5
    assert all("lora" in name for name, state in states.items() if state)


def test_refusals(tmp_path: Path, wide: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    wide["training"] |= {"optimizer": "adamw_8bit"}
    assert main([str(write_job(tmp_path, wide | {"sharing": "DEEPSPEED"}))]) == 1
    assert "adamw_8bit cannot be combined with DEEPSPEED; set it to adamw" in capsys.readouterr().err
    wide["training"] |= {"optimizer_state": "carried"}
    assert main([str(write_job(tmp_path, wide))]) == 1
    assert "8-bit moments (optimizer: adamw_8bit) cannot be carried over" in capsys.readouterr().err
