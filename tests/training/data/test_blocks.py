"""Documents joined into blocks: which tokens, in which order, with which scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest
from transformers import AutoTokenizer

from tests.training.test_train import train_in_splits
from tests.training.tiny import make_tokenizer, write_job
from textalign_dagster.tokenisation import leading_ids
from training.data.blocks import blocks, start_with_end
from training.job import Job, JobError
from training.train import main

SPANS = pl.List(pl.Struct({"start": pl.Int32, "end": pl.Int32, "score": pl.Float64}))
END = 0


def rows(*texts: str, spans: list[Any] | None = None, **columns: Any) -> pl.DataFrame:
    count = len(texts)
    frame = pl.DataFrame(
        {
            "sample_id": [f"s{i}" for i in range(count)],
            "prompt": [""] * count,
            "condition": columns.get("condition", [None] * count),
            "text": list(texts),
            "finish_reason": ["stop"] * count,
            "n_tokens": [1] * count,
            "weight": columns.get("weight", [1.0] * count),
        },
        schema_overrides={"condition": pl.String},
    )
    return frame if spans is None else frame.with_columns(spans=pl.Series(spans, dtype=SPANS))


def job(**training: Any) -> Job:
    return Job.model_validate(
        {
            "rows": "rows.parquet",
            "policy": "policy",
            "out": "out",
            "template": "{condition}{prompt}",
            "special_tokens": ["<|good|>", "<|bad|>"],
            "training": {"block": 6, **training},
        }
    )


@pytest.fixture
def tokenizer() -> Any:
    extended = make_tokenizer()
    extended.add_tokens(["<|good|>", "<|bad|>"], special_tokens=True)
    return extended


def ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def test_documents_are_joined_with_end_tokens_and_nothing_is_dropped(tokenizer: Any) -> None:
    texts = ["x = [1, 2, 3]\n", "def add(a, b):\n    return a + b\n", "x"]
    result = blocks(rows(*texts), tokenizer, job())
    expected = [token for text in texts for token in (END, *ids(tokenizer, text))]
    assert [token for block in result for token in block.text] == expected
    assert {len(block.text) for block in result[:-1]} == {6} and len(result[-1].text) <= 6
    assert all(block.prompt == [] and block.labels == len(block.text) - 1 for block in result)


def test_segments_are_tokenised_separately_and_control_tokens_stay_whole(tokenizer: Any) -> None:
    text = "<|good|>x = [1]\n<|bad|>y\n"
    spans = [{"start": 0, "end": 16, "score": 0.0}, {"start": 16, "end": 25, "score": 0.5}]
    (block,) = blocks(rows(text, spans=[spans]), tokenizer, job(block=100, objective="unlikelihood"))
    good, bad = (tokenizer.convert_tokens_to_ids(token) for token in ("<|good|>", "<|bad|>"))
    first, second = ids(tokenizer, "x = [1]\n"), ids(tokenizer, "y\n")
    assert block.text == [END, good, *first, bad, *second]
    assert block.scores == [0.0] * (2 + len(first)) + [0.5] * (1 + len(second))


def test_end_token_gets_the_score_of_the_first_segment(tokenizer: Any) -> None:
    spans = [{"start": 0, "end": 2, "score": 0.25}]
    (block,) = blocks(rows("x\ny\n", spans=[spans]), tokenizer, job(block=100, objective="unlikelihood"))
    assert block.scores is not None and block.scores[:2] == [0.25, 0.25] and block.scores[-1] == 0.0


def test_condition_precedes_its_document(tokenizer: Any) -> None:
    (block,) = blocks(rows("x\n", condition=["<|good|>"]), tokenizer, job(block=100))
    assert block.text == [END, tokenizer.convert_tokens_to_ids("<|good|>"), *ids(tokenizer, "x\n")]


def test_other_special_tokens_in_a_text_are_plain_text(tokenizer: Any) -> None:
    (block,) = blocks(rows("<|end|>"), tokenizer, job(block=100))
    assert block.text.count(END) == 1


def test_different_weights_are_refused(tokenizer: Any) -> None:
    with pytest.raises(JobError, match="weight: differs between documents, but a block has only one"):
        blocks(rows("x", "y", weight=[1.0, 2.0]), tokenizer, job())


@pytest.mark.parametrize("bos", [False, True])
def test_saved_tokenizer_starts_texts_as_documents_start(bos: bool, tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos=bos)
    before = leading_ids(tokenizer)
    start_with_end(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert leading_ids(AutoTokenizer.from_pretrained(tmp_path)) == (before or [END])
    tokenizer.add_tokens(["<|good|>", "<|bad|>"], special_tokens=True)
    (block,) = blocks(rows("x"), tokenizer, job(block=100))
    assert block.text[0] == (before or [END])[0] and len(block.text) == 2


def test_training_on_blocks(tmp_path: Path, job_of_blocks: dict[str, Any]) -> None:
    """Steps do not depend on how they are split, and the policy is sampled after an end token."""
    splits = {
        "whole": {"batch_size": 8, "gradient_accumulation": 1},
        "parts": {"batch_size": 2, "gradient_accumulation": 4},
    }
    results = train_in_splits(tmp_path, job_of_blocks, splits, {"batch_size": 4, "gradient_accumulation": 1})
    for name, facts in results.items():
        assert facts["losses"] == pytest.approx(results["whole"]["losses"], abs=1e-4), name
    assert results["whole"]["losses"][-1] < results["whole"]["losses"][0] - 0.5
    assert leading_ids(AutoTokenizer.from_pretrained(job_of_blocks["out"])) == [END]


def test_blocks_longer_than_the_context_are_refused(
    tmp_path: Path, job_of_blocks: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    job_of_blocks["training"] |= {"block": 97}
    assert main([str(write_job(tmp_path, job_of_blocks))]) == 1
    assert (
        "training.block: 97, but" in capsys.readouterr().err and not (tmp_path / "out" / "done.json").exists()
    )


@pytest.fixture
def job_of_blocks(tmp_path: Path, policy: Path) -> dict[str, Any]:
    texts = ["def add(a, b):\n    return a + b\n", "def sub(a, b):\n    return a - b\n", "x = [1, 2, 3]\n"]
    rows(*(texts * 20)).write_parquet(tmp_path / "rows.parquet")
    training = {"block": 16, "epochs": 4, "learning_rate": 0.01, "objective": {"entropy_coef": 0.0}}
    return {
        "rows": str(tmp_path / "rows.parquet"),
        "policy": str(policy),
        "out": str(tmp_path / "out"),
        "threads": 1,
        "training": training,
    }
