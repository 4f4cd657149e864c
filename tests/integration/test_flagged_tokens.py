"""The benchmark of CUT's flagged tokens, against flags computed by hand from two forward passes."""

from __future__ import annotations

import math
from pathlib import Path

import polars as pl
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.flagged_tokens import flagged_tokens, picture
from tests.toy import PROJECT
from textalign_dagster.experiment.files import Library
from textalign_dagster.experiment.policies import base_policy


def test_flags_and_marks_by_hand(tmp_path: Path) -> None:
    experiment = Library((PROJECT / "experiments",)).load("pep8_cut")
    prompt, text, judgment = (
        "def f(a):",
        "\n  a=1;\n  return a\n",
        "E111 indentation is not a multiple of 4 x2",
    )
    judged = pl.DataFrame(
        {
            "example_id": ["e"],
            "sample_id": ["s"],
            "prompt": [prompt],
            "second_prompt": [prompt],
            "condition": [judgment],
            "text": [text],
            "finish_reason": ["stop"],
            "weight": [1.0],
        }
    )
    marks = pl.DataFrame({"sample_id": ["s"], "start": [1], "end": [3]})  # the blanks before a=1
    policy = base_policy(experiment).path
    flags = flagged_tokens(experiment, policy, judged, marks)
    assert "".join(text[start:end] for start, end in flags.select("start", "end").rows()) == text

    tokenizer, model = AutoTokenizer.from_pretrained(policy), AutoModelForCausalLM.from_pretrained(policy)
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]

    def log_probs(before: str) -> list[float]:
        start = tokenizer(before, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([[*start, *ids]])).logits[0, len(start) - 1 : -1]
        return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist()

    judged_log_probs, plain_log_probs = log_probs(f"# lint: {judgment}\n{prompt}"), log_probs(prompt)
    expected = [
        first - second > math.log(1.1)
        for first, second in zip(judged_log_probs, plain_log_probs, strict=True)
    ]
    assert flags["flagged"].to_list() == expected and 0 < sum(expected) < len(expected)
    assert flags.filter("marked")["start"].max() < 3 <= flags.filter(~pl.col("marked"))["end"].max()
    picture(judged, flags, tmp_path / "flagged.png")
    assert (tmp_path / "flagged.png").read_bytes().startswith(b"\x89PNG")
