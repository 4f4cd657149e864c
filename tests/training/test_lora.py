"""LoRA: what trains, what is saved, and how new tokens and the reference are handled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.training.tiny import make_model, make_rows, make_tokenizer, write_job
from training.settings import Training
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


def test_merged_folder_is_saved_with_the_adapter_alongside(
    tmp_path: Path, adapted: dict[str, Any], policy: Path
) -> None:
    done = train(tmp_path, adapted)
    assert done["losses"][-1] < done["losses"][0] - 0.5
    assert done["trained_parameters"] < done["parameters"] / 2
    before, after = (load_file(Path(f) / "model.safetensors") for f in (policy, adapted["out"]))
    assert before.keys() == after.keys()  # none of the adapter's names
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "proj" in name}
    # The adapter on top of the parent is the same policy.
    parent = AutoModelForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        with_adapter = peft.PeftModel.from_pretrained(parent, tmp_path / "beside" / "adapter").eval()
        adapted_logits = with_adapter(torch.arange(2, 20)[None]).logits
    assert torch.allclose(adapted_logits, logits(adapted["out"]), atol=1e-5)
    files = {path.suffix for path in (tmp_path / "beside").rglob("*") if path.is_file()}
    assert files <= {".safetensors", ".json", ".md"}


@pytest.mark.parametrize("tied", [True, False])
def test_only_the_rows_of_new_tokens_train(tmp_path: Path, adapted: dict[str, Any], tied: bool) -> None:
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
    # The next iteration starts with the token, which still trains.
    following = adapted | {"policy": adapted["out"], "out": str(tmp_path / "next")}
    train(tmp_path, following)
    assert len(AutoTokenizer.from_pretrained(following["out"])) == new + 1
    next_embeddings = load_file(Path(following["out"]) / "model.safetensors")["model.embed_tokens.weight"]
    moved = (next_embeddings - trained["model.embed_tokens.weight"]).abs().amax(1) > 1e-4
    assert moved.nonzero()[:, 0].tolist() == [new]


@pytest.mark.parametrize("direction", ["policy_to_reference", "reference_to_policy"])
def test_policy_without_its_adapter_serves_as_the_reference(
    tmp_path: Path, adapted: dict[str, Any], policy: Path, direction: str
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in policy.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    adapted["training"] |= {"objective": {"kl_coef": 0.5, "entropy_coef": 0.0, "kl_direction": direction}}
    adapted |= {"special_tokens": ["<|best|>"]}
    losses = [
        train(tmp_path, adapted | {"reference": str(reference)})["losses"] for reference in (policy, copy)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] < losses[0][0]


def following(job: dict[str, Any], before: str, **more: Any) -> dict[str, Any]:
    """The job of the iteration after the one that wrote ``before``: its adapter is trained further, on top of the base."""
    lora = job["training"]["lora"] | {"adapter": "carried"}
    training = job["training"] | {"lora": lora, "learning_rate": 0.003}
    return job | {"adapter": f"{before}/adapter", "training": training, "seed": job["seed"] - 1} | more


def matrices(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def by_hand(policy: str | Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The base's weights with scale · B · A added to each adapted one."""
    weights, adapter_weights = load_file(Path(policy) / "model.safetensors"), matrices(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for name, a in adapter_weights.items():
        if not name.endswith("lora_A.weight"):
            continue
        b = adapter_weights[name.replace("lora_A", "lora_B")]
        place = name.removeprefix("base_model.model.").replace("lora_A.weight", "weight")
        weights[place] += config["lora_alpha"] / config["r"] * b @ a
    return weights


def test_carried_adapter_is_trained_further_on_top_of_the_base(
    tmp_path: Path, adapted: dict[str, Any], policy: Path
) -> None:
    train(tmp_path, adapted)
    first = tmp_path / "beside" / "adapter"
    still = {"out": str(tmp_path / "still"), "beside": str(tmp_path / "beside still")}
    job = following(adapted, adapted["beside"], **still)
    job["training"] = job["training"] | {"learning_rate": 1e-12}
    train(tmp_path, job)  # it starts where the first one ended
    again = matrices(tmp_path / "beside still" / "adapter")
    assert again.keys() == matrices(first).keys() and len(again) == 28
    for name, matrix in matrices(first).items():
        assert torch.allclose(again[name], matrix, atol=1e-7), name
    assert torch.allclose(logits(job["out"]), logits(adapted["out"]), atol=1e-5)

    more = {"out": str(tmp_path / "second"), "beside": str(tmp_path / "beside second")}
    done = train(tmp_path, following(adapted, adapted["beside"], **more))
    second = tmp_path / "beside second" / "adapter"
    assert any(not torch.equal(matrices(first)[n], m) for n, m in matrices(second).items())
    start = json.loads((tmp_path / "out" / "done.json").read_text())["losses"][0]
    assert done["losses"][0] < start - 0.5
    # The checkpoint is the base with one adapter, not the first checkpoint with another one.
    merged = load_file(Path(more["out"]) / "model.safetensors")
    for name, weight in by_hand(policy, second).items():
        assert torch.allclose(merged[name], weight, atol=1e-6), name


def test_carried_adapter_trains_as_with_peft(
    tmp_path: Path, adapted: dict[str, Any], policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same trainer on a model assembled by peft, with the optimizer's state."""
    adapted["training"] |= {
        "lora": ADAPTER | {"adapter": "carried"},
        "optimizer_state": "carried",
        "objective": {"kl_coef": 0.3, "entropy_coef": 0.0},
    }
    adapted["reference"] = str(policy)
    train(tmp_path, adapted)
    state = load_file(tmp_path / "beside" / "optimizer.safetensors")
    assert {name.rpartition("/")[0].split(".")[-3] for name in state} == {"lora_A", "lora_B"}
    job = following(
        adapted, adapted["beside"], out=str(tmp_path / "second"), beside=None, optimizer=adapted["beside"]
    )
    done = train(tmp_path, job)

    import training.lora

    def assembled(model: Any, settings: Any, tokens: list[int], folder: Path) -> Any:
        return peft.PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(policy), adapted["beside"] + "/adapter", is_trainable=True
        )

    monkeypatch.setattr(training.lora, "continue_adapter", assembled)
    by_peft = train(tmp_path, job | {"out": str(tmp_path / "by hand")})
    assert by_peft["losses"] == done["losses"]
    ours, theirs = (load_file(tmp_path / f / "model.safetensors") for f in ("second", "by hand"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    # The moments matter: without them the first step differs.
    fresh = train(tmp_path, job | {"out": str(tmp_path / "fresh"), "optimizer": None})
    assert fresh["losses"][0] == done["losses"][0] and fresh["losses"][2] != done["losses"][2]


@pytest.mark.parametrize("tied", [True, False])
def test_rows_of_new_tokens_are_carried_over(tmp_path: Path, adapted: dict[str, Any], tied: bool) -> None:
    tokenizer = make_tokenizer()
    start, new = tmp_path / "policy", len(tokenizer)
    make_model(new, tied=tied).save_pretrained(start)
    tokenizer.save_pretrained(start)
    make_rows().with_columns(condition=pl.lit("<|best|>")).write_parquet(tmp_path / "rows.parquet")
    adapted |= {"policy": str(start), "template": "{condition}{prompt}", "special_tokens": ["<|best|>"]}
    train(tmp_path, adapted)
    more = {"out": str(tmp_path / "second"), "beside": str(tmp_path / "beside second")}
    still = following(adapted, adapted["beside"], out=str(tmp_path / "still"), beside=None)
    still["training"] = still["training"] | {"learning_rate": 1e-12}
    train(tmp_path, still)
    train(tmp_path, following(adapted, adapted["beside"], **more))
    base = load_file(start / "model.safetensors")
    first, held, second = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "still", "second"))
    for name in ["model.embed_tokens.weight", *([] if tied else ["lm_head.weight"])]:
        assert torch.allclose(held[name][new], first[name][new], atol=1e-7), name  # not initialised again
        assert not torch.allclose(second[name][new], first[name][new], atol=1e-4), name
        assert torch.equal(second[name][:new], base[name]), name
    other = following(adapted, adapted["beside"], special_tokens=["<|best|>", "<|worst|>"])
    assert main([str(write_job(tmp_path, other))]) == 1


def test_parent_as_a_separate_reference(tmp_path: Path, adapted: dict[str, Any], policy: Path) -> None:
    train(tmp_path, adapted)
    objective = {"kl_coef": 1000.0, "entropy_coef": 0.0, "kl_reference_sees_condition": True}
    first_losses = []
    for reference in (adapted["out"], str(policy)):
        job = following(adapted, adapted["beside"], reference=reference, beside=None)
        job |= {"out": str(tmp_path / f"second {len(first_losses)}")}
        job["training"] = job["training"] | {"objective": objective}
        first_losses.append(train(tmp_path, job)["losses"][0])
    # At first the policy is its parent, but far from the base.
    assert first_losses[0] < 6 and first_losses[1] > 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": None}, "adapter: training.lora is null"),
        ({"lora": ADAPTER | {"rank": 3}}, "has rank 2, but training.lora.rank is 3"),
        ({"lora": ADAPTER | {"alpha": 5.0}}, "has alpha 4.0, but training.lora.alpha is 5.0"),
    ],
)
def test_adapters_of_another_kind_are_refused(
    tmp_path: Path, adapted: dict[str, Any], capsys: pytest.CaptureFixture[str], change: Any, message: str
) -> None:
    train(tmp_path, adapted)
    job = adapted | {"adapter": adapted["beside"] + "/adapter"}
    job["training"] = adapted["training"] | change
    assert main([str(write_job(tmp_path, job))]) == 1
    assert message in capsys.readouterr().err


def test_incomplete_adapters_are_refused(
    tmp_path: Path, adapted: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path, adapted)
    job, file = (
        following(adapted, adapted["beside"]),
        tmp_path / "beside" / "adapter" / "adapter_model.safetensors",
    )
    whole = load_file(file)
    name = min(whole)
    save_file({n: m for n, m in whole.items() if n != name}, file)
    assert main([str(write_job(tmp_path, job))]) == 1
    assert "does not fit the policy (Found missing adapter keys" in capsys.readouterr().err
    save_file(whole | {name: torch.zeros(5, 5)}, file)
    assert main([str(write_job(tmp_path, job))]) == 1
    assert "does not fit the policy" in capsys.readouterr().err
    file.unlink()
    assert main([str(write_job(tmp_path, job))]) == 1
    assert "has no adapter_model.safetensors; train the previous iteration again" in capsys.readouterr().err


def test_settings_that_go_with_a_carried_adapter() -> None:
    carried = ADAPTER | {"adapter": "carried"}
    with pytest.raises(ValueError, match=r"start_from: base starts without one; set start_from to parent"):
        Training.model_validate({"lora": carried, "start_from": "base"})
    with pytest.raises(ValueError, match=r"lora.adapter: new\); set it to fresh, or lora.adapter to carried"):
        Training.model_validate({"lora": ADAPTER, "optimizer_state": "carried"})
    assert Training.model_validate({"lora": carried, "optimizer_state": "carried"}).adapts_base
    assert Training.model_validate({"lora": ADAPTER, "start_from": "base"}).adapts_base
    assert not Training.model_validate({"lora": ADAPTER}).adapts_base


def test_target_modules_that_do_not_exist(
    tmp_path: Path, adapted: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    adapted["training"] |= {"lora": ADAPTER | {"target_modules": ["c_attn"]}}
    assert main([str(write_job(tmp_path, adapted))]) == 1
    assert "training.lora: Target modules" in capsys.readouterr().err
