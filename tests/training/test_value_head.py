"""AWR through the real trainer: a head that learns values, is kept for the next iteration, and is not part of the policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.training.state.test_snapshots import keep, killed_after, written
from tests.training.test_train import done, train_in_splits, weights
from tests.training.tiny import make_rows, write_job
from training.train import main
from training.value_head import FILE

SPAN = pl.List(pl.Struct({"start": pl.Int32, "end": pl.Int32, "score": pl.Float64}))


@pytest.fixture
def awr(tmp_path: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Texts of which every third is bad from the character on that distinguishes it from the others."""
    marks = [[{"start": 6, "end": 40, "score": 1.0}] if i % 3 == 2 else [] for i in range(24)]
    rows = make_rows().with_columns(spans=pl.Series(marks, dtype=SPAN))
    rows.write_parquet(tmp_path / "rows.parquet")
    job["training"] |= {"objective": {"name": "awr", "alpha": 0.5, "beta": 0.5}}
    return job


def test_head_learns_and_is_not_part_of_the_policy(tmp_path: Path, awr: dict[str, Any], policy: Path) -> None:
    awr["training"] |= {"epochs": 30}
    assert main([str(write_job(tmp_path, awr))]) == 0
    measured = done(awr)["measured"]
    assert measured["correlation of value and reward"] > 0.9 and measured["value loss"] < 0.06
    before = AutoModelForCausalLM.from_pretrained(policy).state_dict()
    after = AutoModelForCausalLM.from_pretrained(awr["out"]).state_dict()
    assert before.keys() == after.keys() and not any("value" in name for name in weights(awr))


def test_detached_head_does_not_move_the_policy(tmp_path: Path, awr: dict[str, Any]) -> None:
    """With α = 0 a head that is not detached moves the trunk, a detached one does not."""
    moved = {}
    for detached in (False, True):
        awr["training"] |= {
            "objective": {"name": "awr", "alpha": 0.0, "detached": detached},
            "weight_decay": 0.0,
        }
        assert main([str(write_job(tmp_path, awr))]) == 0
        start = AutoModelForCausalLM.from_pretrained(awr["policy"]).state_dict()
        moved[detached] = max(
            float((value - start[name]).abs().max()) for name, value in weights(awr).items()
        )
    assert moved[True] == 0 < moved[False]


def test_step_does_not_depend_on_how_it_is_split(tmp_path: Path, awr: dict[str, Any]) -> None:
    splits = {
        "whole": {"batch_size": 8, "gradient_accumulation": 1},
        "parts": {"batch_size": 2, "gradient_accumulation": 4},
    }
    results = train_in_splits(tmp_path, awr, splits, {"batch_size": 4, "gradient_accumulation": 1})
    for name, facts in results.items():
        assert facts["losses"] == pytest.approx(results["whole"]["losses"], abs=1e-4), name


def test_interrupted_training_resumes_and_the_next_one_starts_from_its_head(
    tmp_path: Path, awr: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    awr |= {"beside": str(tmp_path / "beside")}
    awr["training"] |= {"optimizer_state": "carried"}
    assert main([str(write_job(tmp_path, awr))]) == 0
    alone, head = written(awr), load_file(Path(awr["beside"]) / FILE)["weight"]
    assert head.abs().max() > 0
    folder = keep(awr)
    killed_after(3, awr, tmp_path, monkeypatch)
    assert main([str(write_job(tmp_path, awr))]) == 0
    assert done(awr)["resumed_at"] == [3] and written(awr) == alone
    # The next iteration starts with the head of this one.
    following = awr | {
        "policy": awr["out"],
        "optimizer": awr["beside"],
        "out": str(tmp_path / "next"),
        "beside": str(tmp_path / "next_beside"),
        "snapshots": None,
    }
    following["training"] = awr["training"] | {"learning_rate": 1e-9, "weight_decay": 0.0}
    assert main([str(write_job(tmp_path, following))]) == 0
    assert torch.allclose(load_file(tmp_path / "next_beside" / FILE)["weight"], head, atol=1e-5)
    assert folder.exists()


@pytest.mark.parametrize("change", [{"packing": True}, {"lora": {"rank": 2, "alpha": 4.0}}])
def test_settings_incompatible_with_a_value_head(
    tmp_path: Path, awr: dict[str, Any], change: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    awr["training"] |= change
    assert main([str(write_job(tmp_path, awr))]) == 1
    assert f"training.{next(iter(change))}: cannot be combined with a value head" in capsys.readouterr().err
