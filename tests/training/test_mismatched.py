"""KTO through the real trainer: texts after mismatched prompts, averaged over the whole step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training.test_train import done, train_in_splits
from tests.training.tiny import make_rows, write_job
from training.job import REFERENCE_TABLE
from training.train import main


def labelled(count: int = 9) -> pl.DataFrame:
    rows = make_rows(count).with_columns(condition=pl.lit(None, dtype=pl.String))
    roles = ["chosen" if i % 3 else "rejected" for i in range(count)]
    return rows.with_columns(role=pl.Series(roles), second_prompt=pl.col("prompt").reverse() + " # other")


@pytest.fixture
def job_of_kto(tmp_path: Path, job: dict[str, Any], policy: Path) -> dict[str, Any]:
    labelled().write_parquet(tmp_path / "rows.parquet")
    job["training"] |= {"objective": {"name": "kto", "beta": 0.5}, "gradient_accumulation": 1}
    job["training"] |= {"epochs": 2, "batch_size": 4, "warmup_ratio": 0.0}
    return job | {"reference": str(policy), "beside": str(tmp_path / "beside"), "template": None}


def test_step_does_not_depend_on_how_it_is_split(tmp_path: Path, job_of_kto: dict[str, Any]) -> None:
    """z_0 is computed over the whole step, even if a micro-batch holds only one text."""
    job_of_kto["training"]["learning_rate"] = 1e-2  # far enough from the reference for z_0 to be above 0
    splits = {
        "whole": {"batch_size": 4},
        "single": {"batch_size": 1, "gradient_accumulation": 4},
        "packed": {"batch_size": 4, "packing": True},
    }
    results = train_in_splits(tmp_path, job_of_kto, splits, {"batch_size": 2})
    whole = results["whole"]
    assert whole["measured"]["kl"] > 0.01
    for name, facts in results.items():
        assert facts["losses"] == pytest.approx(whole["losses"], abs=1e-3), name
        assert facts["measured"] == pytest.approx(whole["measured"], rel=0.05, abs=1e-2), name
    known = pl.read_parquet(Path(job_of_kto["beside"]) / REFERENCE_TABLE)
    assert known.height == 18  # each text after both prompts


def test_kl_by_hand(tmp_path: Path, job_of_kto: dict[str, Any], policy: Path, other_policy: Path) -> None:
    """One step from a policy that is not the reference."""
    job_of_kto["training"] |= {"batch_size": 16, "epochs": 1}
    assert main([str(write_job(tmp_path, job_of_kto | {"reference": str(other_policy)}))]) == 0
    tokenizer = AutoTokenizer.from_pretrained(policy)
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (policy, other_policy)]

    def ratio(prompt: str, row: dict[str, Any]) -> float:
        before, text = (
            tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prompt, row["text"])
        )
        text = [*text, *([tokenizer.eos_token_id] if row["finish_reason"] == "stop" else [])]
        sums = []
        for model in models:
            with torch.no_grad():
                logits = model(torch.tensor([[*before, *text]])).logits[0, len(before) - 1 : -1]
            sums.append(float(logits.log_softmax(-1).gather(-1, torch.tensor(text)[:, None]).sum()))
        return sums[0] - sums[1]

    rows = list(labelled().iter_rows(named=True))
    weight = sum(row["weight"] for row in rows)
    kl = max(0.0, sum(row["weight"] * ratio(row["second_prompt"], row) for row in rows) / weight)
    assert done(job_of_kto)["measured"]["kl"] == pytest.approx(kl, abs=1e-3)
    total = 0.0
    for row in rows:
        sign = 1 if row["role"] == "chosen" else -1
        total += row["weight"] * float(
            torch.sigmoid(torch.tensor(-0.5 * sign * (ratio(row["prompt"], row) - kl)))
        )
    assert done(job_of_kto)["losses"][0] == pytest.approx(total / weight, abs=1e-4)


def test_every_text_requires_a_mismatched_prompt(
    tmp_path: Path, job_of_kto: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    labelled().drop("second_prompt").write_parquet(tmp_path / "rows.parquet")
    assert main([str(write_job(tmp_path, job_of_kto))]) == 1
    assert "second_prompt: missing; the objective needs mismatched" in capsys.readouterr().err
