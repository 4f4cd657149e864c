"""Reward models through the real trainer: learned, saved as classifiers, the same however a step is split."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from resources.rewards.scoring import score_samples
from tests.training.test_pairs import pairs
from tests.training.test_train import done, train_in_splits
from tests.training.tiny import make_rows, write_job
from textalign_dagster.scorers import RewardModelScorer
from training.train import main

pytestmark = pytest.mark.usefixtures("quick")

BETTER, WORSE = "\n    return a + b\n", "\n    return a - b\n"


@pytest.fixture
def ranking(tmp_path: Path, job: dict[str, Any]) -> dict[str, Any]:
    rows = pairs().with_columns(text=pl.when(role="chosen").then(pl.lit(BETTER)).otherwise(pl.lit(WORSE)))
    rows.write_parquet(tmp_path / "rows.parquet")
    job["training"] |= {"objective": {"name": "bradley_terry"}, "gradient_accumulation": 1}
    job["training"] |= {"epochs": 4, "batch_size": 8, "warmup_ratio": 0.0, "learning_rate": 3e-3}
    return job | {"template": None}


def rewards(folder: str, texts: list[str]) -> list[float]:
    """The saved model's rewards, as computed by any experiment's scorer."""
    samples = pl.DataFrame(
        {
            "sample_id": [str(i) for i in range(len(texts))],
            "prompt": ["def f(a, b):"] * len(texts),
            "reference": pl.Series([None] * len(texts), dtype=pl.String),
            "text": texts,
            "finish_reason": ["stop"] * len(texts),
        }
    )
    scores = score_samples(RewardModelScorer(model=folder, device="cpu"), samples, lambda *_: None)
    assert scores["status"].to_list() == ["ok"] * len(texts)
    return list(scores["score"])


def test_better_text_gets_the_higher_reward(tmp_path: Path, ranking: dict[str, Any]) -> None:
    assert main([str(write_job(tmp_path, ranking))]) == 0
    assert done(ranking)["losses"][-1] < 0.5 and done(ranking)["measured"]["accuracy"] == 1
    better, worse = rewards(ranking["out"], [BETTER, WORSE])
    assert better > worse
    # The scorer computes the saved classifier's output for prompt and text, without an end token.
    model = AutoModelForSequenceClassification.from_pretrained(ranking["out"])
    tokenizer = AutoTokenizer.from_pretrained(ranking["out"])
    ids = [i for part in ("def f(a, b):", BETTER) for i in tokenizer(part)["input_ids"]]
    with torch.no_grad():
        assert float(model(torch.tensor([ids])).logits) == pytest.approx(better, abs=1e-4)


def test_step_does_not_depend_on_how_it_is_split(tmp_path: Path, ranking: dict[str, Any]) -> None:
    ranking["training"]["epochs"] = 2
    splits = {"whole": {"batch_size": 8}, "parts": {"batch_size": 2, "gradient_accumulation": 4}}
    results = train_in_splits(tmp_path, ranking, splits, {"batch_size": 4})
    for name, facts in results.items():
        assert facts["losses"] == pytest.approx(results["whole"]["losses"], abs=1e-4), name


def test_ratings_with_an_adapter(tmp_path: Path, job: dict[str, Any]) -> None:
    """A new head trains fully, alongside an adapter on frozen weights; prompts of different lengths."""
    texts = [BETTER, WORSE] * 12
    rows = make_rows().with_columns(
        condition=pl.lit(None, dtype=pl.String),
        text=pl.Series(texts),
        reward=pl.Series([1.0, 0.0] * 12),
    )
    rows.write_parquet(tmp_path / "rows.parquet")
    job["training"] |= {"objective": {"name": "rating"}, "lora": {"rank": 4, "alpha": 8}, "epochs": 8}
    job |= {"template": None, "beside": str(tmp_path / "beside")}
    assert main([str(write_job(tmp_path, job))]) == 0
    losses = done(job)["losses"]
    assert losses[0] == pytest.approx(0.25, abs=0.05) and losses[-1] < 0.15
    better, worse = rewards(job["out"], [BETTER, WORSE])
    assert better > 0 > worse


def test_packed_rows_are_refused(
    tmp_path: Path, ranking: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    ranking["training"]["packing"] = True
    assert main([str(write_job(tmp_path, ranking))]) == 1
    assert "training.packing: a score head needs padded rows" in capsys.readouterr().err
