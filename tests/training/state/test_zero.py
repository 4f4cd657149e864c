"""DeepSpeed ZeRO on two processes: the training that one process does, and a plain folder in the end.

Runs on CPUs (gloo). ZeRO-1 differs from ZeRO-2 in what is spread only and is not run here.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from resources.launchers.launcher import Acceleration, accelerate_command
from tests.training.state.test_snapshots import keep, killed_once_kept
from tests.training.test_train import by_hand, done, weights
from tests.training.tiny import make_rows, write_job
from training.acceleration import accelerate_config
from training.train import main

pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")

TOLERANCE = 1e-4
"""Of a loss: sums in another order, and their effect on the steps that follow."""


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_two_processes_under_zero_do_what_one_does(
    name: str, tmp_path: Path, job: dict[str, Any], policy: Path
) -> None:
    make_rows(21).write_parquet(tmp_path / "rows.parquet")
    objective = {"entropy_coef": 0.06, "kl_coef": 0.05, "entropy_target": 40.0, "controller_horizon": 100}
    # Gradients are clipped, and added up over two micro-batches: both are left to DeepSpeed.
    job["training"] |= {"batch_size": 2, "epochs": 2, "max_grad_norm": 0.5, "objective": objective}
    job |= {"reference": str(policy), "special_tokens": ["<|best|>"]}
    packing = name == "zero2"  # packed rows on two processes, too, are padded ones on one
    setting = accelerate_config(name)
    acceleration = Acceleration(
        processes=2, cpu=True, threads=1, config_file=setting.write(tmp_path), deepspeed=True
    )
    two = job | {"world_size": 2, "sharing": "DEEPSPEED", "training": job["training"] | {"packing": packing}}
    result = by_hand(acceleration, write_job(tmp_path, two))
    assert result.returncode == 0, result.stderr
    facts, shared = done(job), weights(job)
    sharded = tmp_path / "sharded"
    Path(job["out"]).rename(sharded)

    # One whose processes are killed goes on to the same numbers.
    snapshots = keep(two)
    path = write_job(tmp_path, two)
    step = killed_once_kept(
        [*accelerate_command(acceleration), "training.train", str(path)], acceleration, two
    )
    result = by_hand(acceleration, path)
    assert result.returncode == 0, result.stderr
    assert done(job)["resumed_at"] == [step]
    assert done(job)["losses"] == facts["losses"] and done(job)["coefficients"] == facts["coefficients"]
    assert all(torch.equal(weight, shared[name]) for name, weight in weights(job).items())
    shutil.rmtree(job["out"])
    shutil.rmtree(snapshots)

    job["training"] |= {"batch_size": 4}
    assert main([str(write_job(tmp_path, job))]) == 0
    assert facts["world_size"] == 2 and len(facts["losses"]) == len(done(job)["losses"]) == 6
    assert facts["losses"] == pytest.approx(done(job)["losses"], abs=TOLERANCE)
    assert facts["coefficients"] == pytest.approx(done(job)["coefficients"], rel=1e-5)
    for one in ("parameters", "trained_parameters"):
        assert facts[one] == done(job)[one]
    alone = weights(job)
    assert shared.keys() == alone.keys() and {w.dtype for w in shared.values()} == {torch.float32}
    for key, weight in alone.items():
        assert torch.allclose(weight, shared[key], atol=2e-3), key

    # Both folders are policies like any other, and equally good ones.
    first = []
    for folder in (Path(job["out"]), sharded):
        out = tmp_path / f"from_{folder.name}"
        following = job | {"policy": str(folder), "out": str(out)}
        following["training"] = job["training"] | {"batch_size": 24, "gradient_accumulation": 1, "epochs": 1}
        assert main([str(write_job(tmp_path, following))]) == 0
        first.append(json.loads((out / "done.json").read_text())["losses"])
    assert len(first[0]) == 1 and first[0] == pytest.approx(first[1], abs=TOLERANCE)
