"""CUT through the real trainer: texts evaluated under two prompts, the same step however it is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training.test_train import done, train_in_splits
from tests.training.tiny import make_rows, write_job
from training.train import main

HEADINGS = "### Response:\n{prompt} feedback: {condition} input: "


def judged(count: int = 9) -> pl.DataFrame:
    """Rows with judgments of different lengths at odd indices, none at even ones."""
    judgments = [None if i % 2 == 0 else "E225 " * (i // 2) + HEADINGS[: 3 * i] for i in range(count)]
    rows = make_rows(count).with_columns(condition=pl.Series(judgments, dtype=pl.String))
    return rows.with_columns(second_prompt=pl.when(pl.col("condition").is_not_null()).then("prompt"))


@pytest.fixture
def cut(tmp_path: Path, job: dict[str, Any]) -> dict[str, Any]:
    judged().write_parquet(tmp_path / "rows.parquet")
    job["training"] |= {"objective": {"name": "cut"}, "gradient_accumulation": 1, "warmup_ratio": 0.0}
    job["training"] |= {"epochs": 2, "batch_size": 4, "max_length": 96}
    return job


def test_first_loss_by_hand(tmp_path: Path, cut: dict[str, Any], policy: Path) -> None:
    """One step over all rows; contexts of different lengths, one of which contains the template's own text."""
    cut["training"] |= {"batch_size": 16, "epochs": 1}
    assert main([str(write_job(tmp_path, cut))]) == 0
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)

    def log_probs(prompt: str, text: list[int]) -> torch.Tensor:
        ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *text]])).logits[0, len(ids) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(text)[:, None])[:, 0].double()

    total = weight = 0.0
    flagged = tokens = 0
    for row in judged().iter_rows(named=True):
        text = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        text = [*text, *([tokenizer.eos_token_id] if row["finish_reason"] == "stop" else [])]
        plain = log_probs(row["prompt"], text)
        each = float(-plain.mean())
        if row["condition"] is not None:
            conditioned = log_probs(f"feedback: {row['condition']} input: {row['prompt']}", text)
            marked = (conditioned - plain).exp() > 1.1
            unlike = -torch.where(marked, torch.log1p(-plain.exp()), plain)
            each = float((-conditioned.mean() + unlike.mean()) / 2)
            flagged, tokens = flagged + int(marked.sum()), tokens + len(text)
        total, weight = total + row["weight"] * each, weight + row["weight"]
    assert done(cut)["losses"][0] == pytest.approx(total / weight, abs=1e-4)
    assert done(cut)["measured"]["flagged share"] == pytest.approx(flagged / tokens) and 0 < flagged < tokens


def test_step_does_not_depend_on_how_it_is_split(tmp_path: Path, cut: dict[str, Any]) -> None:
    splits = {
        "whole": {"batch_size": 4},
        "single": {"batch_size": 1, "gradient_accumulation": 4},
        "packed": {"batch_size": 4, "packing": True},
    }
    results = train_in_splits(tmp_path, cut, splits, {"batch_size": 2})
    for name, facts in results.items():
        assert facts["losses"] == pytest.approx(results["whole"]["losses"], abs=1e-4), name


def test_rows_without_any_judgment(tmp_path: Path, cut: dict[str, Any]) -> None:
    rows = judged().with_columns(
        condition=pl.lit(None, dtype=pl.String), second_prompt=pl.lit(None, dtype=pl.String)
    )
    rows.write_parquet(tmp_path / "rows.parquet")
    assert main([str(write_job(tmp_path, cut))]) == 0
    losses = done(cut)["losses"]
    assert losses[-1] < losses[0] and done(cut)["measured"] == {}


def test_judgment_that_is_too_long_is_refused(
    tmp_path: Path, cut: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    cut["training"]["max_length"] = 40
    rows = judged().with_columns(
        condition=pl.when(pl.col("condition").is_not_null()).then(pl.lit("E225 " * 20))
    )
    rows.write_parquet(tmp_path / "rows.parquet")
    assert main([str(write_job(tmp_path, cut))]) == 1
    assert (
        "sample s1: the text has" in (error := capsys.readouterr().err)
        and "training.max_length (40)" in error
    )
