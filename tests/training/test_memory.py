"""Too little memory: a one-line error that names settings."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.tiny import write_job
from training.job import JobError, read_job
from training.memory import enough_memory
from training.train import main
from training.trainer import ObjectiveTrainer


def test_out_of_memory_error_names_settings_that_help(
    tmp_path: Path, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def too_much(*_: Any, **__: Any) -> torch.Tensor:
        return torch.empty(2**50)

    monkeypatch.setattr(ObjectiveTrainer, "compute_loss", too_much)
    assert main([str(write_job(tmp_path, job))]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "out of memory: this machine has too little" in line and "training.gradient_checkpointing" in line
    assert "lower training.batch_size" in line and "training.accelerate: zero2_offload" in line
    assert not (Path(job["out"]) / "done.json").exists()


def test_other_errors_are_not_changed(tmp_path: Path, job: dict[str, Any]) -> None:
    read = read_job(write_job(tmp_path, job))
    with pytest.raises(RuntimeError, match="must match") as caught, enough_memory(read):
        torch.zeros(2) + torch.zeros(3)
    assert not isinstance(caught.value, JobError)
    accelerator = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB\nmore")
    with (
        pytest.raises(JobError, match=r"the accelerator has too little .*Tried to allocate 20 GiB\)"),
        enough_memory(read),
    ):
        raise accelerator
    with pytest.raises(JobError, match=r"this machine has too little .*\(MemoryError\)"), enough_memory(read):
        raise MemoryError
