"""Pretraining at toy size: the folder it writes, its chunks, and that a seed determines all of it."""

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training import pretrain
from training.pretrain import IGNORED, Settings

PAIRS = [(f"def f{n}(a, b):\n    return a + {n}", f"def f{n}(a, b):\n  return a + {n};") for n in range(40)]
TINY = Settings(
    tokens=400,
    vocabulary=300,
    context=16,
    chunk_characters=60,
    batch=4,
    hidden=32,
    feed_forward=32,
    layers=1,
    heads=1,
    warmup=2,
)


@pytest.fixture
def tokenizer():
    return pretrain.train_tokenizer([text for pair in PAIRS for text in pair], TINY)


def test_tokenizer_preserves_whitespace(tokenizer):
    text = "\n    x =  1 ,y\n\n\n\tdef é(): # no blank , cleaned\n"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token_id == 0 and tokenizer.pad_token_id == 1
    assert not {0, 1} & set(ids)  # no special tokens are added


def test_a_chunk_is_wholly_clean_or_wholly_sloppy():
    texts = pretrain.chunks(PAIRS, TINY, epoch=0)
    # a function has about 33 characters: two reach 60, which ends the chunk
    assert {text.count("def ") for text in texts} == {2}
    assert {text.count(";") for text in texts} == {0, 2}


def test_chunks_vary_by_epoch_and_seed_only():
    assert pretrain.chunks(PAIRS, TINY, 0) == pretrain.chunks(PAIRS, TINY, 0)
    assert pretrain.chunks(PAIRS, TINY, 0) != pretrain.chunks(PAIRS, TINY, 1)
    assert pretrain.chunks(PAIRS, TINY, 0) != pretrain.chunks(PAIRS, Settings(**{**vars(TINY), "seed": 1}), 0)


def test_a_function_without_a_sloppy_form_is_left_out_of_sloppy_chunks():
    settings = Settings(sloppy_share=1.0, chunk_characters=1)
    assert pretrain.chunks([("a", None), ("b", "c")], settings, 0) == ["c"]


def test_encode_cuts_and_pads_on_the_right(tokenizer):
    rows = pretrain.encode(["def f0(a, b):", "x"], tokenizer, 3)
    assert rows.shape == (2, 3)
    assert rows[0].tolist() == tokenizer("def f0(a, b):")["input_ids"][:3]
    assert rows[1].tolist() == [*tokenizer("x")["input_ids"], IGNORED, IGNORED]


def test_loss_ignores_padding(tokenizer):
    torch.manual_seed(0)
    model = pretrain.new_model(TINY, tokenizer)
    rows = pretrain.encode(["def f0(a, b):", "return a"], tokenizer, 12)
    lengths = [(row != IGNORED).sum().item() for row in rows]
    alone = [
        pretrain.token_losses(model, row[None, :length]).item()
        for row, length in zip(rows, lengths, strict=True)
    ]
    # the mean over all tokens but each row's first
    total = sum(loss * (length - 1) for loss, length in zip(alone, lengths, strict=True))
    expected = total / (sum(lengths) - 2)
    assert pretrain.token_losses(model, rows).item() == pytest.approx(expected, abs=1e-5)


def test_fit_takes_the_stated_steps_and_lowers_the_loss(tokenizer):
    torch.manual_seed(0)
    model = pretrain.new_model(TINY, tokenizer)
    held = next(pretrain.batches(PAIRS, tokenizer, TINY))
    before = pretrain.token_losses(model, held).item()
    steps = pretrain.fit(model, pretrain.batches(PAIRS, tokenizer, TINY), TINY)
    assert steps == math.ceil(400 / (4 * 16)) == 7
    assert pretrain.token_losses(model, held).item() < before


@pytest.fixture
def small_corpus(monkeypatch):
    """A corpus of a few functions: the real one takes seconds to rewrite."""
    few = pretrain.corpus.functions(held_out=True)[:150]
    monkeypatch.setattr(pretrain.corpus, "functions", lambda held_out=False: few)


def command(out: Path, *more: str) -> list[str]:
    return [
        "pep8",
        "--out",
        str(out),
        "--tokens",
        "400",
        "--vocabulary",
        "300",
        "--context",
        "16",
        "--batch",
        "4",
        "--hidden",
        "32",
        "--feed-forward",
        "32",
        "--layers",
        "1",
        "--heads",
        "1",
        *more,
    ]


def test_folder_loads_like_any_model_and_records_its_provenance(tmp_path: Path, small_corpus):
    out = tmp_path / "policy"
    pretrain.main(command(out))

    assert {path.name for path in out.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "provenance.json",
        "README.md",
    }
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]  # no scratch files left
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.config.vocab_size == len(tokenizer) == 300
    assert tokenizer.decode(tokenizer("a ,b  =c")["input_ids"]) == "a ,b  =c"

    provenance = json.loads((out / "provenance.json").read_text())
    assert provenance["steps"] == 7 and provenance["tokens"] == 448
    assert provenance["command"][3:] == command(out)
    assert provenance["corpus"]["functions"] == 150
    assert set(provenance["held_out_perplexity"]) == {"clean", "sloppy"}
    assert "made sloppy on purpose" in (out / "README.md").read_text()


def test_seed_determines_the_weights(tmp_path: Path, small_corpus):
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        pretrain.main(command(tmp_path / name, "--seed", seed))
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "abc"]
    assert weights[0] == weights[1] != weights[2]


def test_existing_folder_is_replaced_only_with_overwrite(tmp_path: Path, small_corpus, capsys):
    out = tmp_path / "policy"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    with pytest.raises(SystemExit):
        pretrain.main(command(out))
    assert "--overwrite" in capsys.readouterr().err and (out / "mine.txt").exists()
    pretrain.main(command(out, "--overwrite"))
    assert not (out / "mine.txt").exists() and (out / "config.json").exists()
