"""Weights of samples drawn by another policy, by hand and through the real trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training.test_pairs import pairs
from tests.training.test_train import done
from tests.training.tiny import make_rows, write_job
from training.data.examples import Example
from training.density_ratio import density_ratios, effective_share
from training.job import POLICY_TABLE
from training.objectives.base import ROLES
from training.settings import DensityRatio
from training.train import main


def example(sampled: float, role: str = "only", group: int | None = None) -> Example:
    return Example(
        [1], [2], 1.0, role=ROLES.index(role), group=group, sampled_log_prob=sampled, sample_id="s"
    )


def test_ratios_by_hand() -> None:
    examples = [example(-3.0), example(-1.5), example(-9.0), example(-1.0, "member", 7)]
    log_probs = [[-1.0, -1.0], [-2.0], [-1.0, -2.0, -1.0], [-1.5]]
    ratios = density_ratios(examples, log_probs, DensityRatio(), "rows")
    assert ratios == pytest.approx([math.e, math.exp(-0.5), 10.0, math.exp(-0.5)])
    ratios = density_ratios(examples, log_probs, DensityRatio(per="token"), "rows")
    assert ratios == pytest.approx([math.exp(0.5), math.exp(-0.5), math.exp(5 / 3), math.exp(-0.5)])


def test_a_pair_has_one_ratio() -> None:
    """Gaps of +1 (two tokens) and -0.25 (one token): 0.75 in total, 0.25 per token."""
    examples = [example(-3.0, "chosen", 0), example(-1.0, "rejected", 0), example(-1.0, "chosen", 1)]
    log_probs = [[-1.0, -1.0], [-1.25], [-1.0]]
    assert density_ratios(examples, log_probs, DensityRatio(), "rows") == pytest.approx(
        [math.exp(0.75), math.exp(0.75), 1.0]
    )
    assert density_ratios(examples, log_probs, DensityRatio(per="token"), "rows") == pytest.approx(
        [math.exp(0.25), math.exp(0.25), 1.0]
    )


def test_effective_share() -> None:
    assert effective_share([2.0, 2.0]) == 1.0
    assert effective_share([3.0, 1.0]) == pytest.approx(16 / 20)


def by_hand(rows: pl.DataFrame, folder: Path) -> list[float]:
    """The log-probability of each row's text after its prompt and condition."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    log_probs = []
    for row in rows.iter_rows(named=True):
        condition, prompt = row["condition"], row["prompt"]
        read = prompt if condition is None else f"feedback: {condition} input: {prompt}"
        ids = tokenizer(read, add_special_tokens=False)["input_ids"]
        text = tokenizer(row["text"], add_special_tokens=False)["input_ids"]
        text = [*text, *([tokenizer.eos_token_id] if row["finish_reason"] == "stop" else [])]
        with torch.no_grad():
            logits = model(torch.tensor([[*ids, *text]])).logits[0, len(ids) - 1 : -1]
        values = logits.log_softmax(-1).gather(-1, torch.tensor(text)[:, None])[:, 0]
        log_probs.append(float(values.sum()))
    return log_probs


@pytest.mark.parametrize("lora", [None, {"rank": 2, "alpha": 4, "dropout": 0.1}])
def test_training_with_ratios_equals_one_with_these_weights(
    tmp_path: Path, job: dict[str, Any], policy: Path, other_policy: Path, lora: dict[str, Any] | None
) -> None:
    rows = make_rows(12).with_columns(sampled_logprob=pl.Series(by_hand(make_rows(12), other_policy)))
    rows.write_parquet(tmp_path / "rows.parquet")
    ratios = [
        min(max(math.exp(now - then), 0.5), 2.0)
        for now, then in zip(by_hand(rows, policy), rows["sampled_logprob"], strict=True)
    ]
    assert len({0.5, 2.0} & set(ratios)) == 2 and len(set(ratios)) > 3  # both bounds, and values between
    job |= {"beside": str(tmp_path / "beside")}
    job["training"] |= {"density_ratio": {"clip": [0.5, 2.0]}, "epochs": 1, "lora": lora}
    assert main([str(write_job(tmp_path, job))]) == 0
    facts = done(job)
    clipped = sum(ratio in (0.5, 2.0) for ratio in ratios) / 12
    assert facts["measured"]["density ratio, clipped share"] == pytest.approx(clipped)
    assert facts["measured"]["density ratio, mean"] == pytest.approx(sum(ratios) / 12, abs=1e-4)
    assert pl.read_parquet(Path(job["beside"]) / POLICY_TABLE).height == 12

    rows.with_columns(weight=pl.col("weight") * pl.Series(ratios)).write_parquet(tmp_path / "rows.parquet")
    job["training"] |= {"density_ratio": None}
    assert main([str(write_job(tmp_path, job))]) == 0
    assert done(job)["losses"] == pytest.approx(facts["losses"], abs=1e-4)


def test_policy_that_is_its_own_reference_is_evaluated_once(
    tmp_path: Path, job: dict[str, Any], policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = pairs()
    rows.with_columns(sampled_logprob=pl.Series(by_hand(rows, policy))).write_parquet(
        tmp_path / "rows.parquet"
    )
    job |= {"reference": str(policy), "beside": str(tmp_path / "beside"), "template": None}
    job["training"] |= {"objective": "dpo", "density_ratio": {}, "epochs": 1}
    assert main([str(write_job(tmp_path, job))]) == 0
    assert not (Path(job["beside"]) / POLICY_TABLE).exists()
    assert capsys.readouterr().err.count("log-probs:") == 1
    # The policy drew the samples itself.
    assert done(job)["measured"]["density ratio, mean"] == pytest.approx(1, abs=1e-3)


def test_unsupported_density_ratios_are_refused(
    tmp_path: Path, job: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    job |= {"beside": str(tmp_path / "beside")}
    job["training"] |= {"density_ratio": {}}
    assert main([str(write_job(tmp_path, job))]) == 1
    assert "sampled_logprob: NULL in 24 of 24 rows, first in sample s0" in capsys.readouterr().err
    for objective, message in (("grpo", "already includes this ratio"), ("rating", "trains a reward model")):
        job["training"] |= {"objective": objective}
        assert main([str(write_job(tmp_path, job))]) == 1
        assert message in capsys.readouterr().err
    job["training"] |= {"objective": "nll", "density_ratio": {"clip": [0, 1]}}
    assert main([str(write_job(tmp_path, job))]) == 1
    assert "the smallest ratio comes first, above 0" in capsys.readouterr().err
