"""Training end to end: through accelerate launch and Pipes, by hand, on bad input, split differently."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, get_scheduler

from resources.launchers.launcher import (
    Acceleration,
    Launched,
    LocalLauncher,
    accelerate_command,
    accelerate_env,
)
from tests import forked
from tests.training.tiny import make_rows, write_job
from textalign_dagster import PROJECT
from training.train import main, thinned
from training.trainer import lr_factor

ROOT = PROJECT
ONE = Acceleration(cpu=True, threads=1)
ADAPTIVE = {
    "kl_coef": 0.05,
    "kl_target": 3.0,
    "entropy_coef": 0.06,
    "entropy_target": 40.0,
    "controller_horizon": 100,
}


def by_hand(settings: Acceleration, job: Path) -> subprocess.CompletedProcess[str]:
    """``accelerate launch … training.train JOB``."""
    command = [*accelerate_command(settings), "training.train", str(job)]
    env = {**os.environ, **accelerate_env(settings), "PYTHONPATH": str(ROOT)}
    program = ["-m", "tests.accelerate_launch"]
    return forked.run(program, command[3:], env=env, cwd=job.parent, text="", timeout=300)


def weights(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load_file(Path(job["out"]) / "model.safetensors")


def done(job: dict[str, Any]) -> dict[str, Any]:
    return json.loads((Path(job["out"]) / "done.json").read_text())


def train_in_splits(
    folder: Path, job: dict[str, Any], splits: dict[str, dict[str, Any]], each: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Trains the job with the settings of each split, and on two processes with the settings ``each``; all
    must end with the weights of the first split.

    Returns:
        The facts that each training reports, by its name.
    """
    results = {}
    for name, settings in splits.items():
        assert main([str(write_job(folder, job | {"training": job["training"] | settings}))]) == 0
        results[name] = (done(job), weights(job))
    two = Acceleration(processes=2, cpu=True, threads=1)
    path = write_job(folder, job | {"world_size": 2, "training": job["training"] | each})
    result = by_hand(two, path)
    assert result.returncode == 0, result.stderr
    results["two processes"] = (done(job), weights(job))
    expected = results[next(iter(splits))][1]
    for name, (_, these) in results.items():
        for weight, value in expected.items():
            assert torch.allclose(value, these[weight], atol=2e-3), (name, weight)
    return {name: facts for name, (facts, _) in results.items()}


def test_through_dagster_and_by_hand(tmp_path: Path, job: dict[str, Any]) -> None:
    seen: list[dict[str, Any]] = []
    launched: list[Launched] = []
    path = write_job(tmp_path, job)

    @dg.asset
    def checkpoint(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        launched.append(
            LocalLauncher().launch(
                context,
                [*accelerate_command(ONE), "training.train", str(path)],
                {},
                {**accelerate_env(ONE), "PYTHONPATH": str(ROOT)},
                seen.append,
                log=tmp_path / "train.log",
                done=Path(job["out"]) / "done.json",
            )
        )
        return dg.MaterializeResult()

    dg.materialize([checkpoint])
    facts = launched[0].done
    assert facts == done(job)
    assert facts is not None and facts["steps"] == 12 and facts["rows"] == 24 and facts["world_size"] == 1
    assert facts["final_loss"] < facts["losses"][0] - 1
    parts = facts["seconds"]
    assert list(parts) == ["load", "train", "save"] and all(took > 0 for took in parts.values())
    assert sum(parts.values()) < launched[0].seconds
    assert 0 < facts["first_step_seconds"] < parts["train"]
    assert facts["tokens_per_s"] == pytest.approx(facts["tokens"] / parts["train"])
    assert seen[0]["done"] == 1 and seen[-1]["done"] == seen[-1]["total"] == 12
    assert set(seen[0]) == {"done", "total", "loss", "tokens_per_s", "lr"}
    assert facts["accelerators"] == 0 and facts["peak_memory"]["accelerator_bytes"] is None
    assert facts["peak_memory"]["host_bytes"] > 50_000_000
    assert seen[0]["lr"] == 0 < seen[-1]["lr"] < 0.01  # the rate of this step, not of the next one

    out = Path(job["out"])
    assert not [file.name for file in out.iterdir() if file.suffix in (".bin", ".pt", ".pkl")]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.use_cache
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    prompt = tokenizer("feedback: good input: def f1(a, b):", return_tensors="pt")
    assert (
        model.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1]
        == prompt["input_ids"].shape[1] + 3
    )

    first = (out / "model.safetensors").read_bytes()
    again = by_hand(ONE, path)
    assert again.returncode == 0, again.stderr
    assert "step 12/12" in again.stderr
    assert (out / "model.safetensors").read_bytes() == first


def test_two_processes_match_one(tmp_path: Path, job: dict[str, Any], policy: Path) -> None:
    # 21 rows in steps of 8: the last step does not fill both processes' micro-batches.
    make_rows(21).write_parquet(tmp_path / "rows.parquet")
    job["training"] |= {"batch_size": 4, "gradient_accumulation": 1, "objective": ADAPTIVE}
    job["reference"] = str(policy)
    result = by_hand(
        Acceleration(processes=2, cpu=True, threads=1), write_job(tmp_path, job | {"world_size": 2})
    )
    assert result.returncode == 0, result.stderr
    two, facts = weights(job), done(job)
    job["training"] |= {"batch_size": 8}
    assert main([str(write_job(tmp_path, job))]) == 0
    assert facts["world_size"] == 2 and facts["accelerators"] == 0
    assert set(facts["coefficients"]) == {"kl_coef", "entropy_coef"}
    assert facts["coefficients"] == pytest.approx(done(job)["coefficients"], rel=1e-6)
    assert facts["losses"] == pytest.approx(done(job)["losses"], abs=1e-4)
    assert facts["tokens"] == pytest.approx(done(job)["tokens"], abs=100)  # filler rows
    for name, weight in weights(job).items():
        assert torch.allclose(weight, two[name], atol=2e-3), name


def test_gradient_checkpointing_does_not_change_the_result(tmp_path: Path, job: dict[str, Any]) -> None:
    once, twice = {}, {}
    for target, checkpointing in ((once, False), (twice, True)):
        job["training"] |= {"gradient_checkpointing": checkpointing, "trainable_layers": 1}
        assert main([str(write_job(tmp_path, job))]) == 0
        target |= weights(job) | {"losses": torch.tensor(done(job)["losses"])}
    for name in once:
        assert torch.allclose(once[name], twice[name], atol=1e-6), name


def test_mixed_precision_keeps_float32_weights(tmp_path: Path, job: dict[str, Any]) -> None:
    runs = []
    for precision in ("no", "bf16"):
        job["training"] |= {"mixed_precision": precision}
        assert main([str(write_job(tmp_path, job))]) == 0
        runs.append(done(job)["losses"])
    assert runs[0] != runs[1] and runs[0] == pytest.approx(runs[1], abs=0.05)
    assert {weight.dtype for weight in weights(job).values()} == {torch.float32}


def test_only_the_last_block_trains(tmp_path: Path, job: dict[str, Any], policy: Path) -> None:
    job["training"] |= {"trainable_layers": 0.5}
    assert main([str(write_job(tmp_path, job))]) == 0
    before, after = load_file(policy / "model.safetensors"), weights(job)
    still = {name for name in before if torch.equal(before[name], after[name])}
    assert still == {name for name in before if name.startswith("model.layers.0.")}
    sizes = {name: weight.numel() for name, weight in before.items()}
    assert done(job)["parameters"] == sum(sizes.values())
    assert done(job)["trained_parameters"] == sum(n for name, n in sizes.items() if name not in still)


def test_more_trainable_blocks_than_the_model_has(
    tmp_path: Path, job: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    job["training"] |= {"trainable_layers": 3}
    assert main([str(write_job(tmp_path, job))]) == 1
    assert "training.trainable_layers: cannot train 3 blocks, the model has 2" in capsys.readouterr().err


def test_gradient_accumulation_matches_a_large_batch(
    tmp_path: Path, job: dict[str, Any], policy: Path
) -> None:
    job |= {"reference": str(policy), "special_tokens": ["<|good|>"]}
    job["training"]["objective"] = {"entropy_coef": 0.06, "kl_coef": 0.05}
    runs = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        job["training"] |= {
            "batch_size": batch_size,
            "gradient_accumulation": accumulation,
            "epochs": 1,
        }
        assert main([str(write_job(tmp_path, job))]) == 0
        runs.append((done(job)["losses"], weights(job)))
    assert runs[0][0] == pytest.approx(runs[1][0], abs=1e-4)
    for name in runs[0][1]:
        assert torch.allclose(runs[0][1][name], runs[1][1][name], atol=1e-3), name


def test_first_loss_is_the_weighted_mean(tmp_path: Path, job: dict[str, Any], policy: Path) -> None:
    job["training"] |= {"batch_size": 24, "gradient_accumulation": 1, "epochs": 1}
    assert main([str(write_job(tmp_path, job))]) == 0
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(policy),
        AutoTokenizer.from_pretrained(policy),
    )
    total = mass = 0.0
    for row in make_rows().iter_rows(named=True):
        prompt = (
            row["prompt"]
            if row["condition"] is None
            else f"feedback: {row['condition']} input: {row['prompt']}"
        )
        start, text = tokenizer(prompt)["input_ids"], tokenizer(row["text"])["input_ids"]
        text += [tokenizer.eos_token_id] if row["finish_reason"] == "stop" else []
        with torch.no_grad():
            log_probs = model(torch.tensor([start + text])).logits[0].log_softmax(-1)
        for i, token in enumerate(text):
            total -= row["weight"] * float(log_probs[len(start) + i - 1, token])
            mass += row["weight"]
    assert done(job)["losses"] == pytest.approx([total / mass], abs=1e-5)


@pytest.mark.parametrize("direction", ["policy_to_reference", "reference_to_policy"])
@pytest.mark.parametrize("sees", [True, False])
def test_kl_to_a_reference_with_or_without_the_condition(
    tmp_path: Path, job: dict[str, Any], policy: Path, sees: bool, direction: str
) -> None:
    def first_loss(kl_coef: float) -> float:
        objective = {
            "kl_coef": kl_coef,
            "kl_direction": direction,
            "kl_reference_sees_condition": sees,
        }
        job["training"] |= {
            "objective": objective,
            "epochs": 1,
            "batch_size": 24,
            "gradient_accumulation": 1,
        }
        assert main([str(write_job(tmp_path, job | {"reference": str(policy)}))]) == 0
        return float(done(job)["losses"][0])

    # With the policy as its own reference, the KL starts at 0 if and only if both see the same prompt.
    penalty = first_loss(10.0) - first_loss(0.0)
    assert penalty == pytest.approx(0.0, abs=1e-4) if sees else penalty > 0.001


def test_special_tokens_are_learned_and_saved(tmp_path: Path, job: dict[str, Any], policy: Path) -> None:
    make_rows().with_columns(condition=pl.lit("<|best|>")).write_parquet(tmp_path / "rows.parquet")
    job |= {
        "template": "{condition}{prompt}",
        "special_tokens": ["<|best|>"],
        "reference": str(policy),
    }
    job["training"]["objective"] = {"kl_coef": 0.05}
    assert main([str(write_job(tmp_path, job))]) == 0
    tokenizer = AutoTokenizer.from_pretrained(job["out"])
    assert len(tokenizer("<|best|>")["input_ids"]) == 1
    assert AutoModelForCausalLM.from_pretrained(job["out"]).get_input_embeddings().weight.shape[0] == len(
        tokenizer
    )
    # The next iteration starts from a policy that knows the token, with a reference that does not.
    following = job | {"policy": job["out"], "out": str(tmp_path / "next")}
    assert main([str(write_job(tmp_path, following))]) == 0
    assert len(AutoTokenizer.from_pretrained(following["out"])) == len(tokenizer)


def broken_policy(folder: Path, policy: Path) -> Path:
    """A copy of the policy whose weights are NaN."""
    folder.mkdir()
    for file in policy.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    state = load_file(policy / "model.safetensors")
    save_file(
        {name: torch.full_like(t, float("nan")) for name, t in state.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


def test_nan_loss_stops_the_training(
    tmp_path: Path, job: dict[str, Any], policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job["policy"] = str(broken_policy(tmp_path / "broken", policy))
    assert main([str(write_job(tmp_path, job))]) == 1
    assert "the loss is nan at step 1; lower training.learning_rate" in capsys.readouterr().err
    assert not (Path(job["out"]) / "done.json").exists()
    assert not (Path(job["out"]) / "model.safetensors").exists()


def test_bad_jobs(
    tmp_path: Path, job: dict[str, Any], policy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(changes: dict[str, Any], training: dict[str, Any] | None = None) -> str:
        content = job | changes | {"training": job["training"] | (training or {})}
        assert main([str(write_job(tmp_path, content))]) == 1
        assert not (tmp_path / "out" / "done.json").exists()
        return capsys.readouterr().err

    torn, unreadable, pickled = tmp_path / "torn", tmp_path / "unreadable", tmp_path / "pickled"
    for folder, name in ((torn, "config.json"), (unreadable, ""), (pickled, "model.safetensors")):
        folder.mkdir()
        for file in policy.iterdir():
            if file.name != name:
                (folder / file.name).write_bytes(file.read_bytes())
    (unreadable / "model.safetensors").write_bytes(b"\0" * 100)
    (pickled / "pytorch_model.bin").write_bytes(b"")

    assert "rows: no such file" in refused({"rows": str(tmp_path / "none.parquet")})
    assert f"policy: no such folder: {tmp_path / 'none'}" in refused({"policy": str(tmp_path / "none")})
    assert f"{torn} has no config.json" in refused({"policy": str(torn)})
    assert f"{pickled} has no model*.safetensors (pickled weights are not loaded" in refused(
        {"policy": str(pickled)}
    )
    assert f"{unreadable}: the model cannot be loaded" in refused({"policy": str(unreadable)})
    assert "template: " in refused({"template": "{condition}"})
    assert "leraning_rate" in refused({}, {"leraning_rate": 1})
    assert "training.epochs" in refused({}, {"epochs": 0})
    assert "reference: missing" in refused({}, {"objective": {"kl_coef": 0.1}})
    assert "max_new_tokens: missing" in refused({}, {"eos_rule": "legacy"})
    assert "reads at most 96 tokens" in refused({}, {"max_length": 97})
    assert "the launcher started 1" in refused({"world_size": 2})
    message = refused(
        {"reference": str(policy), "special_tokens": ["<|x|>"]},
        {"objective": {"kl_coef": 0.1, "kl_reference_sees_condition": True}},
    )
    assert "does not know the special tokens" in message
    assert "the job expects DEEPSPEED, accelerate started NO" in refused({"sharing": "DEEPSPEED"})
    make_rows().clear().write_parquet(tmp_path / "empty.parquet")
    assert "empty.parquet: no rows" in refused({"rows": str(tmp_path / "empty.parquet")})
    assert main([str(tmp_path / "no_job.json")]) == 1
    assert "no such job file" in capsys.readouterr().err


def test_launcher_that_starts_too_few_processes_is_detected(tmp_path: Path, job: dict[str, Any]) -> None:
    command = accelerate_command(ONE)
    command[command.index("--num_processes") + 1] = "2"
    path = write_job(tmp_path, job | {"world_size": 2})
    env = {**os.environ, **accelerate_env(ONE), "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, "training.train", str(path)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode != 0
    assert "the job expects 2 processes, the launcher started 1" in result.stderr


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_schedules_match_transformers(schedule: str) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    theirs = get_scheduler(schedule, optimizer, num_warmup_steps=3, num_training_steps=20)
    for step in range(20):
        assert lr_factor(step, 20, 3, schedule, 0.0) == pytest.approx(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()


def test_schedules_end_at_their_final_share() -> None:
    assert lr_factor(20, 20, 0, "linear", 0.1) == lr_factor(20, 20, 0, "cosine", 0.1) == pytest.approx(0.1)
    assert lr_factor(10, 20, 0, "linear", 0.1) == pytest.approx(0.55)
    assert lr_factor(19, 20, 5, "constant", 0.0) == 1.0
    assert lr_factor(0, 20, 0, "constant", 0.0) == 1.0


def test_thinned_losses() -> None:
    assert thinned([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    assert thinned([1.0, 3.0, 5.0], points=2) == [2.0, 5.0]
    assert len(thinned([math.pi] * 1000)) <= 64


def test_bad_input_is_refused_before_torch_is_loaded(tmp_path: Path) -> None:
    code = (
        "import sys, training.train as t; t.main([sys.argv[1]]); "
        "print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "none")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == ["False", "False"]


def test_configuration_file_decides_how_processes_share_the_work() -> None:
    settings = Acceleration(processes=2, cpu=True, config_file=Path("/c.yaml"), deepspeed=True)
    command, env = accelerate_command(settings), accelerate_env(settings)
    assert command[command.index("--config_file") + 1] == "/c.yaml"
    assert "--multi_gpu" not in command and "--cpu" not in command
    # With this variable, DeepSpeed would silently not be used.
    assert "ACCELERATE_USE_CPU" not in env and env["DS_ACCELERATOR"] == "cpu"
    alone = accelerate_command(Acceleration(config_file=Path("/c.yaml")))
    assert alone[alone.index("--main_process_port") + 1] == "0"  # any free port
