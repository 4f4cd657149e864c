"""Fixtures: policy folders and a valid job."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.training.tiny import make_model, make_rows, make_tokenizer


@pytest.fixture(scope="session")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random Llama of 30,000 weights and its tokenizer."""
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = make_tokenizer()
    make_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def other_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy folder with the same tokenizer and other weights."""
    folder = tmp_path_factory.mktemp("other_policy")
    tokenizer = make_tokenizer()
    make_model(len(tokenizer), seed=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def job(tmp_path: Path, policy: Path) -> dict[str, Any]:
    """The content of a valid job file."""
    make_rows().write_parquet(tmp_path / "rows.parquet")
    return {
        "rows": str(tmp_path / "rows.parquet"),
        "policy": str(policy),
        "out": str(tmp_path / "out"),
        "template": "feedback: {condition} input: {prompt}",
        "seed": 2**62 + 1,
        "threads": 1,
        "training": {
            "learning_rate": 0.01,
            "epochs": 4,
            "batch_size": 4,
            "gradient_accumulation": 2,
            "max_length": 64,
            "warmup_ratio": 0.1,
            "betas": [0.9, 0.999],
            "objective": {"entropy_coef": 0.0},
        },
    }
