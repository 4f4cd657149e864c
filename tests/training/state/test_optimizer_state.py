"""Two iterations with a carried optimizer equal one uninterrupted training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import training.data.batches
from tests.training.tiny import make_rows, write_job
from training.train import main

STEADY = {"schedule": "constant", "warmup_ratio": 0.0, "epochs": 1}


def train(folder: Path, job: dict[str, Any], **changes: Any) -> dict[str, torch.Tensor]:
    """Trains, and returns the weights."""
    job = job | changes
    assert main([str(write_job(folder, job))]) == 0
    return load_file(Path(job["out"]) / "model.safetensors")


def carried(folder: Path, job: dict[str, Any], **settings: Any) -> dict[str, Any]:
    """The job with ``optimizer_state: carried``, whose state goes to the folder ``beside``."""
    return job | {
        "beside": str(folder / "beside"),
        "training": job["training"] | STEADY | {"optimizer_state": "carried"} | settings,
    }


def test_two_iterations_equal_one_training(
    tmp_path: Path, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = training.data.batches.plan_batches
    job = carried(tmp_path, job)
    first = job | {"seed": 1, "out": str(tmp_path / "first")}
    second = job | {
        "seed": 2,
        "policy": first["out"],
        "out": str(tmp_path / "second"),
        "optimizer": str(tmp_path / "beside"),
        "beside": str(tmp_path / "beside2"),
    }
    train(tmp_path, first)
    twice = train(tmp_path, second)
    fresh = train(
        tmp_path, second, optimizer=None, out=str(tmp_path / "fresh"), beside=str(tmp_path / "beside3")
    )

    def both(*rows: Any, seed: int, **options: Any) -> Any:
        return plan(*rows, seed=1, **options) + plan(*rows, seed=2, **options)

    monkeypatch.setattr(training.data.batches, "plan_batches", both)
    once = train(tmp_path, job, out=str(tmp_path / "once"), beside=str(tmp_path / "beside1"))
    assert all(torch.equal(twice[name], once[name]) for name in once)
    assert not all(torch.equal(fresh[name], once[name]) for name in once)
    ends = [load_file(tmp_path / folder / "optimizer.safetensors") for folder in ("beside1", "beside2")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])
    assert float(ends[0]["model.norm.weight/step"]) == 6


def test_new_tokens_start_with_zero_moments(tmp_path: Path, job: dict[str, Any]) -> None:
    job = carried(tmp_path, job, epochs=0.1, learning_rate=1e-9)
    train(tmp_path, job)
    before = load_file(tmp_path / "beside" / "optimizer.safetensors")["model.embed_tokens.weight/exp_avg"]
    # The token is in no row: with tied embeddings its moments only get the softmax's gradient.
    second = {"optimizer": job["beside"], "special_tokens": ["<|new|>"], "policy": job["out"]}
    train(tmp_path, job, **second, out=str(tmp_path / "second"), beside=str(tmp_path / "beside2"))
    after = load_file(tmp_path / "beside2" / "optimizer.safetensors")
    moments = after["model.embed_tokens.weight/exp_avg_sq"]
    assert moments.shape[0] == before.shape[0] + 1
    assert float(after["model.embed_tokens.weight/step"]) == 2
    assert 0 < float(moments[-1].max()) < float(moments[:-1].max())


def test_frozen_blocks_save_no_state_and_lose_their_previous_one(tmp_path: Path, job: dict[str, Any]) -> None:
    train(tmp_path, carried(tmp_path, job, epochs=0.1))
    second = {"optimizer": str(tmp_path / "beside"), "beside": str(tmp_path / "beside2")}
    train(tmp_path, carried(tmp_path, job, epochs=0.1, trainable_layers=1) | second)
    kept = load_file(tmp_path / "beside2" / "optimizer.safetensors")
    assert any(key.startswith("model.layers.1.") for key in kept)
    assert not any(key.startswith("model.layers.0.") for key in kept)
    # And the reverse: blocks that train for the first time start with fresh state.
    third = {"optimizer": str(tmp_path / "beside2"), "beside": str(tmp_path / "beside3")}
    train(tmp_path, carried(tmp_path, job, epochs=0.1) | third)
    steps = {
        key: float(value)
        for key, value in load_file(tmp_path / "beside3" / "optimizer.safetensors").items()
        if key.endswith("/step")
    }
    assert steps["model.layers.0.mlp.up_proj.weight/step"] == 1
    assert steps["model.layers.1.mlp.up_proj.weight/step"] == 3


def test_adapted_coefficients_are_carried_over(tmp_path: Path, job: dict[str, Any]) -> None:
    objective = {"entropy_coef": 0.1, "entropy_target": 1.0, "controller_horizon": 100}
    job = carried(tmp_path, job, objective=objective)
    train(tmp_path, job)
    done = json.loads((Path(job["out"]) / "done.json").read_text())
    facts = json.loads((tmp_path / "beside" / "optimizer.json").read_text())
    assert facts["coefficients"] == done["coefficients"]
    second = {"optimizer": job["beside"], "policy": job["out"], "out": str(tmp_path / "second")}
    train(tmp_path, job, **second)
    later = json.loads((tmp_path / "second" / "done.json").read_text())["coefficients"]
    # The entropy of 10 tokens is far above the target: 24 rows lower the coefficient by 20 % of 24 / 100.
    step = 1 - 0.2 * 8 / 100
    assert done["coefficients"] == {"entropy_coef": pytest.approx(0.1 * step**3)}
    assert later == {"entropy_coef": pytest.approx(0.1 * step**6)}


def test_unusable_states_are_refused(
    tmp_path: Path, job: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    make_rows(2).write_parquet(tmp_path / "rows.parquet")
    job = carried(tmp_path, job)
    train(tmp_path, job)

    def refused(**changes: Any) -> str:
        assert main([str(write_job(tmp_path, job | changes))]) == 1
        return capsys.readouterr().err

    state = tmp_path / "beside"
    assert "holds no state to continue from" in refused(optimizer=str(tmp_path / "nowhere"))
    tensors = state / "optimizer.safetensors"
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[:50])
    assert "holds no state to continue from" in refused(optimizer=str(state))
    tensors.write_bytes(whole.replace(b"model.norm.weight", b"model.form.weight"))
    assert "another model's state (it has model.form.weight" in refused(optimizer=str(state))
    assert "DEEPSPEED keeps optimizer state in its own format" in refused(sharing="DEEPSPEED")
