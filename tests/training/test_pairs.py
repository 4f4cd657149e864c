"""Pairs through the real trainer: the same step however it is split, and a reference that is evaluated once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training.test_train import done, train_in_splits, weights
from tests.training.tiny import make_rows, write_job
from training.job import REFERENCE_TABLE
from training.train import main


def pairs(count: int = 9) -> pl.DataFrame:
    """Pairs of rows of different lengths, weights 1 and 2; no condition."""
    rows = make_rows(2 * count)
    return rows.with_columns(
        prompt=pl.Series([f"def f{i // 2}(a, b):" for i in range(2 * count)]),
        condition=pl.lit(None, dtype=pl.String),
        role=pl.Series(["chosen", "rejected"] * count),
        group_id=pl.Series([f"pair {i // 2:02d}" for i in range(2 * count)]),
        weight=pl.Series([1.0 + i // 2 % 2 for i in range(2 * count)]),
    )


@pytest.fixture
def dpo(tmp_path: Path, job: dict[str, Any], policy: Path) -> dict[str, Any]:
    """A job with pairs; the policy is its own reference."""
    pairs().write_parquet(tmp_path / "rows.parquet")
    job["training"] |= {"objective": {"name": "dpo", "beta": 0.5}, "gradient_accumulation": 1}
    job["training"] |= {"epochs": 2, "batch_size": 8}
    return job | {"reference": str(policy), "beside": str(tmp_path / "beside"), "template": None}


def table(job: dict[str, Any]) -> pl.DataFrame:
    return pl.read_parquet(Path(job["beside"]) / REFERENCE_TABLE)


def test_loss_starts_at_log_2_and_falls(tmp_path: Path, dpo: dict[str, Any]) -> None:
    better, worse = "\n    return a + b\n", "\n    return a - b\n"
    same = pairs().with_columns(text=pl.when(role="chosen").then(pl.lit(better)).otherwise(pl.lit(worse)))
    same.write_parquet(tmp_path / "rows.parquet")
    dpo["training"] |= {"warmup_ratio": 0.0, "epochs": 4}
    assert main([str(write_job(tmp_path, dpo))]) == 0
    losses = done(dpo)["losses"]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5) and losses[-1] < losses[0] - 0.1
    assert done(dpo)["measured"]["accuracy"] == 1 and done(dpo)["measured"]["margin"] > 0.5


def test_step_does_not_depend_on_how_it_is_split(tmp_path: Path, dpo: dict[str, Any]) -> None:
    """9 pairs in steps of 4: the last step fills neither all micro-batches nor both processes."""
    splits = {
        "whole": {"batch_size": 8, "gradient_accumulation": 1},
        "parts": {"batch_size": 2, "gradient_accumulation": 4},
        "odd": {"batch_size": 3, "gradient_accumulation": 4},
    }
    results = train_in_splits(tmp_path, dpo, splits, {"batch_size": 4, "gradient_accumulation": 1})
    assert table(dpo).height == 18  # each process computed its half
    whole = results["whole"]
    for name, facts in results.items():
        assert facts["steps"] == 6 and facts["losses"] == pytest.approx(whole["losses"], abs=1e-4), name
        assert facts["measured"] == pytest.approx(whole["measured"], abs=1e-3), name


def test_reference_is_evaluated_once_and_shared(
    tmp_path: Path, dpo: dict[str, Any], policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(write_job(tmp_path, dpo))]) == 0
    assert "reference log-probs: 18 computed, 0 cached" in capsys.readouterr().err
    first, known = weights(dpo), table(dpo)
    # By hand: the log-probability of each text after its prompt.
    model, tokenizer = AutoModelForCausalLM.from_pretrained(policy), AutoTokenizer.from_pretrained(policy)
    rows = {row["sample_id"]: row for row in pairs().iter_rows(named=True)}
    for row in known.iter_rows(named=True):
        sample = rows[row["sample_id"]]
        prompt, text = (
            tokenizer(sample[part], add_special_tokens=False)["input_ids"] for part in ("prompt", "text")
        )
        text = [*text, *([tokenizer.eos_token_id] if sample["finish_reason"] == "stop" else [])]
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1]
        values = logits.log_softmax(-1).gather(-1, torch.tensor(text)[:, None])[:, 0]
        assert row["log_probs"] == pytest.approx(values.tolist(), abs=1e-5)
        assert row["log_prob"] == pytest.approx(float(values.sum()), abs=1e-4)
    # Known log-probabilities are not recomputed; another objective with the same needs uses them, too.
    known.filter(pl.col("sample_id") != "s3").write_parquet(tmp_path / "known.parquet")
    dpo["reference_log_probs"] = str(tmp_path / "known.parquet")
    assert main([str(write_job(tmp_path, dpo))]) == 0
    assert "reference log-probs: 1 computed, 17 cached" in capsys.readouterr().err
    assert table(dpo)["sample_id"].to_list() == ["s3"]
    assert all(torch.equal(first[name], value) for name, value in weights(dpo).items())


def test_reference_with_lora_and_packing(
    tmp_path: Path, dpo: dict[str, Any], policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dpo["training"] |= {"lora": {"rank": 2, "alpha": 4}, "packing": True, "warmup_ratio": 0.0}
    assert main([str(write_job(tmp_path, dpo))]) == 0
    assert done(dpo)["losses"][0] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows.drop("group_id"), "group_id: missing; the objective needs groups"),
        (lambda rows: rows[1:], "group_id: 1 pairs are not one chosen and one rejected row"),
        (
            lambda rows: rows.with_columns(weight=pl.Series(range(1, rows.height + 1)).cast(pl.Float64)),
            "of equal weight",
        ),
        (lambda rows: rows.with_columns(role=pl.lit("better")), "role: is not one of only, chosen"),
    ],
)
def test_bad_pairs(
    tmp_path: Path, dpo: dict[str, Any], change: Any, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(pairs()).write_parquet(tmp_path / "rows.parquet")
    assert main([str(write_job(tmp_path, dpo))]) == 1
    assert message in capsys.readouterr().err


def test_bad_settings(tmp_path: Path, dpo: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    def refused(changes: dict[str, Any], **training: Any) -> str:
        content = json.loads(json.dumps(dpo | changes))
        content["training"] |= training
        assert main([str(write_job(tmp_path, content))]) == 1
        return capsys.readouterr().err

    assert "training.batch_size: 1: groups of up to 2 rows are read together" in refused({}, batch_size=1)
    assert "beside: missing; the reference's log-probabilities" in refused({"beside": None})
    assert "reference: missing; training.objective (dpo) needs the base policy" in refused(
        {"reference": None}
    )
    assert "training.objective" in refused({}, objective={"name": "dpo", "entropy_coef": 0.1})
    assert "training.objective" in refused({}, objective="dppo")


def test_empty_text_drops_its_pair(
    tmp_path: Path, dpo: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pairs().with_columns(
        text=pl.when(pl.col("sample_id") == "s0").then(pl.lit("")).otherwise("text"),
        finish_reason=pl.lit("length"),
    )
    rows.write_parquet(tmp_path / "rows.parquet")
    assert main([str(write_job(tmp_path, dpo))]) == 0
    assert done(dpo)["rows"] == 16
    assert "2 of 18 rows" in capsys.readouterr().err


def test_spans_affect_their_tokens(tmp_path: Path, job: dict[str, Any]) -> None:
    """The tokens of a marked span become less likely, those around it more likely."""
    marked = [{"start": 5, "end": 11, "score": 1.0}]  # "return" in "\n    return a + b\n"
    rows = make_rows(24).filter(pl.col("text").str.starts_with("\n    return"))
    rows = rows.with_columns(spans=pl.Series([marked] * rows.height), condition=pl.lit(None, dtype=pl.String))
    rows.write_parquet(tmp_path / "rows.parquet")
    job["training"] |= {"objective": {"name": "unlikelihood"}, "epochs": 20, "warmup_ratio": 0.0}
    assert main([str(write_job(tmp_path, job))]) == 0
    model, tokenizer = (kind.from_pretrained(job["out"]) for kind in (AutoModelForCausalLM, AutoTokenizer))
    prompt, text = (
        tokenizer(x, add_special_tokens=False)["input_ids"] for x in ("def f1(a, b):", rows["text"][0])
    )
    offsets = tokenizer(rows["text"][0], add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *text]])).logits[0, len(prompt) - 1 : -1]
    chances = logits.softmax(-1).gather(-1, torch.tensor(text)[:, None])[:, 0]
    inside = torch.tensor([start < 11 and end > 5 for start, end in offsets])
    assert inside.any() and chances[inside].max() < 0.05 < 0.5 < chances[~inside].median()
    assert done(job)["measured"]["probability of marked tokens"] < 0.05
