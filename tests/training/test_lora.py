"""LoRA: what trains, what is handed over, what new tokens and the reference do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training.tiny import make_model, make_rows, make_tokenizer, write_job
from training.train import main

peft = pytest.importorskip("peft", reason="the extra `lora` is not installed")

ADAPTER = {"rank": 2, "alpha": 4.0}


@pytest.fixture
def adapted(tmp_path: Path, job: dict[str, Any]) -> dict[str, Any]:
    """The content of a job with an adapter."""
    return job | {"beside": str(tmp_path / "beside"), "training": job["training"] | {"lora": ADAPTER}}


def train(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    assert main([str(write_job(folder, job))]) == 0
    return json.loads((Path(job["out"]) / "done.json").read_text())


def logits(folder: str | Path) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        return model(torch.arange(2, 20)[None]).logits


def test_a_plain_folder_is_handed_over_with_the_adapter_beside_it(
    tmp_path: Path, adapted: dict[str, Any], policy: Path
) -> None:
    done = train(tmp_path, adapted)
    assert done["losses"][-1] < done["losses"][0] - 0.5
    assert done["trained_parameters"] < done["parameters"] / 2
    before, after = (load_file(Path(f) / "model.safetensors") for f in (policy, adapted["out"]))
    assert before.keys() == after.keys()  # nothing of the adapter's names
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "proj" in name}
    # The adapter alone, on the parent, is the same policy.
    parent = AutoModelForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        there = peft.PeftModel.from_pretrained(parent, tmp_path / "beside" / "adapter").eval()
        again = there(torch.arange(2, 20)[None]).logits
    assert torch.allclose(again, logits(adapted["out"]), atol=1e-5)
    files = {path.suffix for path in (tmp_path / "beside").rglob("*") if path.is_file()}
    assert files <= {".safetensors", ".json", ".md"}


@pytest.mark.parametrize("tied", [True, False])
def test_the_rows_of_new_tokens_train_and_no_others(
    tmp_path: Path, adapted: dict[str, Any], tied: bool
) -> None:
    tokenizer = make_tokenizer()
    start = tmp_path / "policy"
    make_model(len(tokenizer), tied=tied).save_pretrained(start)
    tokenizer.save_pretrained(start)
    make_rows().with_columns(condition=pl.lit("<|best|>")).write_parquet(tmp_path / "rows.parquet")
    adapted |= {"policy": str(start), "template": "{condition}{prompt}", "special_tokens": ["<|best|>"]}
    still = adapted | {
        "training": adapted["training"] | {"learning_rate": 1e-12},
        "out": str(tmp_path / "still"),
    }
    train(tmp_path, still)
    train(tmp_path, adapted)
    untrained, trained = (load_file(Path(j["out"]) / "model.safetensors") for j in (still, adapted))
    new = len(tokenizer)
    for name in ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]:
        moved = (untrained[name] - trained[name]).abs().amax(1) > 1e-4
        assert moved.nonzero()[:, 0].tolist() == [new], name
    # The next iteration knows the token already, and it still trains.
    following = adapted | {"policy": adapted["out"], "out": str(tmp_path / "next")}
    train(tmp_path, following)
    assert len(AutoTokenizer.from_pretrained(following["out"])) == new + 1
    there = load_file(Path(following["out"]) / "model.safetensors")["model.embed_tokens.weight"]
    moved = (there - trained["model.embed_tokens.weight"]).abs().amax(1) > 1e-4
    assert moved.nonzero()[:, 0].tolist() == [new]


@pytest.mark.parametrize("direction", ["policy_to_reference", "reference_to_policy"])
def test_the_policy_without_its_adapter_is_as_good_a_reference_as_a_copy(
    tmp_path: Path, adapted: dict[str, Any], policy: Path, direction: str
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in policy.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    adapted["training"] |= {"objective": {"kl_coef": 0.5, "entropy_coef": 0.0, "kl_direction": direction}}
    adapted |= {"special_tokens": ["<|best|>"]}
    losses = [train(tmp_path, adapted | {"reference": str(one)})["losses"] for one in (policy, copy)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] < losses[0][0]


def test_modules_that_are_not_there(
    tmp_path: Path, adapted: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    adapted["training"] |= {"lora": ADAPTER | {"target_modules": ["c_attn"]}}
    assert main([str(write_job(tmp_path, adapted))]) == 1
    assert "training.lora: Target modules" in capsys.readouterr().err
