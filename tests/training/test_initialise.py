"""A policy with random weights: the same architecture and tokenizer, other weights, determined by a seed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.initialise import main


def test_random_weights_by_seed(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        assert main([str(policy), "--out", str(tmp_path / name), "--seed", str(seed)]) == 0
    a, b, c, old = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict()
        for folder in (tmp_path / "a", tmp_path / "b", tmp_path / "c", policy)
    )
    assert all(torch.equal(a[name], b[name]) for name in a) and a.keys() == old.keys()
    embeddings = "model.embed_tokens.weight"
    assert not torch.equal(a[embeddings], c[embeddings]) and not torch.equal(a[embeddings], old[embeddings])
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (tmp_path / "a", policy)]
    assert tokenizers[0]("def add(a, b):") == tokenizers[1]("def add(a, b):")
    assert main([str(tmp_path / "none"), "--out", str(tmp_path / "d")]) == 1
    assert "no such folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(policy), "--out", str(tmp_path / "a")])
