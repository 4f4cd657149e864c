"""Groups through the real trainer: the same step however it is split, and learning from rewards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.training.test_train import done, train_in_splits
from tests.training.tiny import make_rows, write_job
from training.train import main


def groups(count: int = 5, size: int = 3) -> pl.DataFrame:
    """Groups of samples of one prompt; texts that add have the higher rewards."""
    rows = make_rows(count * size)
    return rows.with_columns(
        prompt=pl.Series([f"def f{i // size}(a, b):" for i in range(count * size)]),
        condition=pl.lit(None, dtype=pl.String),
        role=pl.lit("member"),
        group_id=pl.Series([f"prompt {i // size}" for i in range(count * size)]),
        reward=pl.Series([float("a + b" in text) for text in rows["text"]]),
        sampled_logprob=pl.lit(-60.0),
        weight=pl.lit(1.0),
    )


@pytest.fixture
def grouped(tmp_path: Path, job: dict[str, Any], policy: Path) -> dict[str, Any]:
    groups().write_parquet(tmp_path / "rows.parquet")
    job["training"] |= {"objective": {"name": "grpo", "kl_coef": 0.05}, "gradient_accumulation": 1}
    job["training"] |= {"epochs": 2, "batch_size": 6, "warmup_ratio": 0.0}
    return job | {"reference": str(policy), "beside": str(tmp_path / "beside"), "template": None}


@pytest.mark.parametrize("objective", [{"name": "grpo", "kl_coef": 0.05}, {"name": "rloo"}])
def test_step_does_not_depend_on_how_it_is_split(
    tmp_path: Path, grouped: dict[str, Any], objective: dict[str, Any]
) -> None:
    """5 groups in steps of 2: the last step fills neither all micro-batches nor both processes."""
    grouped["training"] |= {"objective": objective}
    splits = {
        "whole": {"batch_size": 6, "gradient_accumulation": 1},
        "parts": {"batch_size": 3, "gradient_accumulation": 2},
        "odd": {"batch_size": 5, "gradient_accumulation": 2},
    }
    results = train_in_splits(tmp_path, grouped, splits, {"batch_size": 3, "gradient_accumulation": 1})
    whole = results["whole"]
    for name, facts in results.items():
        assert facts["steps"] == 6 and facts["losses"] == pytest.approx(whole["losses"], abs=1e-3), name


def test_better_samples_become_more_likely(tmp_path: Path, grouped: dict[str, Any]) -> None:
    grouped["training"] |= {"epochs": 6, "objective": {"name": "grpo"}}
    assert main([str(write_job(tmp_path, grouped))]) == 0
    losses = done(grouped)["losses"]
    assert losses[0] == pytest.approx(0, abs=1e-5)  # ratios are 1, and advantages sum to 0
    assert min(losses) < -0.05


def test_group_larger_than_the_batch_is_refused(
    tmp_path: Path, grouped: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    grouped["training"] |= {"batch_size": 2}
    assert main([str(write_job(tmp_path, grouped))]) == 1
    assert "raise batch_size to 3" in capsys.readouterr().err


def test_rewards_are_required(
    tmp_path: Path, grouped: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = groups().with_columns(reward=pl.when(pl.col("sample_id") != "s4").then("reward"))
    rows.write_parquet(tmp_path / "rows.parquet")
    assert main([str(write_job(tmp_path, grouped))]) == 1
    assert "reward: is NULL, but the objective needs rewards (in 1 of 15 rows" in capsys.readouterr().err
