"""Accelerate configurations: the shipped ones, and what is refused before anything starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from textalign_dagster import PROJECT
from textalign_dagster.experiment.files import TEMPLATES, Library
from textalign_dagster.loop.stages import stage_settings
from textalign_dagster.settings import SettingsError, validate
from training.acceleration import accelerate_config, check_training, shipped
from training.settings import Training

LIBRARY = Library((PROJECT / "experiments", TEMPLATES))


def training(**settings: Any) -> Training:
    validated: Training = validate(Training, settings, "here")
    return validated


def refusal(devices: int = 0, dtype: str = "float32", installed: bool = True, **settings: Any) -> str:
    """The one-line error with which a training is refused."""
    with pytest.raises(SettingsError) as error:
        check_training(
            training(**settings), dtype=dtype, devices=lambda: devices, installed=lambda _: installed
        )
    assert "\n" not in str(error.value)
    return str(error.value)


def accepted(devices: int = 8, **settings: Any) -> None:
    check_training(training(**settings), dtype="float32", devices=lambda: devices, installed=lambda _: True)


def config_file(folder: Path, **content: Any) -> str:
    path = folder / "mine.yaml"
    path.write_text(yaml.safe_dump({"distributed_type": "DEEPSPEED", **content}))
    return str(path)


def test_shipped() -> None:
    assert shipped() == ("fsdp", "multi_gpu", "zero1", "zero2", "zero2_offload", "zero3")
    stages = {name: accelerate_config(name).zero_stage for name in shipped()}
    assert stages == {
        "fsdp": None, "multi_gpu": None, "zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3
    }  # fmt: skip
    for name in shipped():
        accepted(processes=2, accelerate=name, mixed_precision="bf16")


def test_published_configuration() -> None:
    deepspeed = accelerate_config("zero2_offload").deepspeed
    assert deepspeed is not None
    assert deepspeed["zero_optimization"]["offload_optimizer"] == {"device": "cpu", "pin_memory": True}
    assert {
        name: deepspeed["fp16"][name] for name in ("initial_scale_power", "loss_scale_window", "hysteresis")
    } == {
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
    }
    accepted(processes=2, accelerate="zero2_offload", mixed_precision="fp16")


@pytest.mark.parametrize("name", shipped())
def test_accelerate_reads_the_written_configuration(name: str, tmp_path: Path) -> None:
    config = pytest.importorskip("accelerate.commands.config.config_args")
    path = accelerate_config(name).write(tmp_path)
    read = config.load_config_from_file(str(path))
    assert read.distributed_type.value == accelerate_config(name).kind
    if read.deepspeed_config:
        inner = Path(read.deepspeed_config["deepspeed_config_file"])
        assert inner.parent == tmp_path  # wherever the training starts
        assert json.loads(inner.read_text()) == accelerate_config(name).deepspeed


def test_names_and_files(tmp_path: Path) -> None:
    assert "'zero4' is neither a file nor one of fsdp, multi_gpu, zero1" in refusal(accelerate="zero4")
    assert "did you mean 'zero2_offload'" in refusal(accelerate="zero2_ofload")
    assert "MULTI_CPU starts one process only" in refusal(
        accelerate=config_file(tmp_path, distributed_type="MULTI_CPU")
    )
    assert "'MEGATRON_LM' is not supported; use one of DEEPSPEED" in refusal(
        accelerate=config_file(tmp_path, distributed_type="MEGATRON_LM")
    )
    assert "only LOCAL_MACHINE" in refusal(
        accelerate=config_file(tmp_path, compute_environment="AMAZON_SAGEMAKER")
    )
    assert "deepspeed_config: missing" in refusal(accelerate=config_file(tmp_path))
    for stage in ("auto", 4, None):
        path = config_file(tmp_path, deepspeed_config={"zero_stage": stage})
        assert "the ZeRO stage is not one of 0, 1, 2, 3" in refusal(accelerate=path)
    assert "cannot be read as JSON" in refusal(
        accelerate=config_file(tmp_path, deepspeed_config={"deepspeed_config_file": "none.json"})
    )
    (tmp_path / "ds.json").write_text("{}")
    assert "zero_optimization: missing" in refusal(
        accelerate=config_file(tmp_path, deepspeed_config={"deepspeed_config_file": "ds.json"})
    )


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("num_processes", 4, "num_processes is 4, but training.processes is 2"),
        ("num_machines", 2, "num_machines is 2"),
        ("mixed_precision", "fp16", "mixed_precision is 'fp16', but training.mixed_precision is 'no'"),
        ("use_cpu", True, "use_cpu is True"),
    ],
)
def test_contradictions(field: str, value: Any, expected: str, tmp_path: Path) -> None:
    fields = {"deepspeed_config": {"zero_stage": 2}}
    message = refusal(accelerate=config_file(tmp_path, **fields, **{field: value}), processes=2, devices=2)
    assert expected in message and "make them agree" in message
    accepted(accelerate=config_file(tmp_path, **fields, num_processes=-1), processes=2)


@pytest.mark.parametrize(
    ("deepspeed", "expected"),
    [
        (
            {"gradient_accumulation_steps": 4},
            "gradient_accumulation_steps is 4, but the section training has 1",
        ),
        ({"gradient_clipping": 0.3}, "gradient_clipping is 0.3, but the section training has 1.0"),
        ({"zero_stage": 3}, "no checkpoint can be written"),
        ({"zero_stage": 3, "zero3_save_16bit_model": True, "zero3_init_flag": True}, "zero3_init_flag"),
        ({"optimizer": {}}, "optimizer: is set by the experiment"),
    ],
)
def test_deepspeed_settings_must_agree(deepspeed: dict[str, Any], expected: str, tmp_path: Path) -> None:
    path = config_file(tmp_path, deepspeed_config={"zero_stage": 2, **deepspeed})
    assert expected in refusal(accelerate=path, processes=2, devices=2)


def test_settings_in_deepspeeds_own_file_must_agree(tmp_path: Path) -> None:
    zero2 = accelerate_config("zero2").deepspeed
    assert zero2 is not None
    (tmp_path / "ds.json").write_text(
        json.dumps({**zero2, "fp16": {"enabled": True}, "train_batch_size": 16})
    )
    path = config_file(tmp_path, deepspeed_config={"deepspeed_config_file": "ds.json"})
    assert "train_batch_size is 16, but the section training has 8" in refusal(accelerate=path, batch_size=8)
    assert "fp16.enabled is True, but the section training has False" in refusal(
        accelerate=path, batch_size=8, processes=2, devices=2
    )
    accepted(accelerate=path, batch_size=8, processes=2, mixed_precision="fp16")


def test_missing_packages_and_accelerators() -> None:
    assert "pip install -e '.[deepspeed]'" in refusal(accelerate="zero2", processes=2, installed=False)
    assert "pip install -e '.[lora]'" in refusal(lora={}, installed=False)
    assert "fsdp needs accelerators" in refusal(accelerate="fsdp", processes=2)
    assert "multi_gpu needs accelerators" in refusal(accelerate="multi_gpu", processes=2)
    assert "fp16 needs an accelerator" in refusal(mixed_precision="fp16")
    assert "bf16 with zero2 needs an accelerator" in refusal(
        accelerate="zero2", processes=2, mixed_precision="bf16"
    )
    assert "training.processes: 4, but this machine has 2 accelerators" in refusal(processes=4, devices=2)
    assert "fp16 cannot be combined with policy.dtype bfloat16" in refusal(
        mixed_precision="fp16", dtype="bfloat16", devices=1
    )
    for settings in ({"processes": 4}, {"processes": 2, "accelerate": "zero3"}, {"mixed_precision": "bf16"}):
        accepted(devices=0, **settings)


def test_this_machine_is_not_checked_for_trainings_elsewhere() -> None:
    check_training(training(mixed_precision="fp16", processes=64), dtype="float32", devices=None)


def test_unsupported_combinations() -> None:
    assert "fsdp needs at least 2 processes" in refusal(accelerate="fsdp", devices=2)
    both = {"processes": 2, "devices": 2}
    assert "optimizer_state: carried is not supported with zero1" in refusal(
        accelerate="zero1", optimizer_state="carried", **both
    )
    for name in ("zero3", "fsdp"):
        assert f"cannot be merged into the sharded weights of {name}" in refusal(
            accelerate=name, lora={}, **both
        )
    for settings, message in (
        ({"lora": {}, "trainable_layers": 2}, "adapters leave every block frozen"),
        ({"lora": {}, "optimizer_state": "carried"}, "each iteration has a new adapter"),
        ({"start_from": "base", "optimizer_state": "carried"}, "set start_from to parent"),
        ({"trainable_layers": 1.5}, "trainable_layers"),
        ({"trainable_layers": -1}, "trainable_layers"),
    ):
        with pytest.raises(SettingsError, match=message):
            training(**settings)


def test_moments_in_8_bits() -> None:
    accepted(optimizer="adamw_8bit", processes=2)
    assert "adamw_8bit needs the bitsandbytes package: pip install -e '.[8bit]'" in refusal(
        optimizer="adamw_8bit", installed=False
    )
    for name in ("zero2", "fsdp"):
        message = refusal(devices=2, optimizer="adamw_8bit", processes=2, accelerate=name)
        assert f"training.optimizer: adamw_8bit is not supported with {name}" in message
    with pytest.raises(SettingsError, match=r"optimizer_state: 8-bit moments .* set it to fresh"):
        training(optimizer="adamw_8bit", optimizer_state="carried")


def test_shares_and_counts_of_blocks_keep_their_type() -> None:
    for value in (1, 1.0, 0, 0.0, None):
        again = training(**json.loads(training(trainable_layers=value).model_dump_json()))
        assert again.trainable_layers == value and type(again.trainable_layers) is type(value)


def test_configuration_is_identified_by_its_content(tmp_path: Path) -> None:
    """A checkpoint depends on the content of the file, not on its name or location."""

    def settings(*overrides: str) -> dict[str, Any]:
        return stage_settings(LIBRARY.overridden("pep8_alt_lmu", overrides), "checkpoint", 1)

    plain = settings()
    assert settings("training.gradient_checkpointing=true") == plain
    for override in ("mixed_precision=bf16", "trainable_layers=2", "lora.rank=4", "optimizer_state=carried", "packing=true",
                     "optimizer=adamw_8bit"):  # fmt: skip
        assert settings(f"training.{override}") != plain
    first = config_file(tmp_path, deepspeed_config={"zero_stage": 2})
    (tmp_path / "elsewhere").mkdir()
    same = config_file(tmp_path / "elsewhere", deepspeed_config={"zero_stage": 2})
    assert settings(f"training.accelerate={first}") == settings(f"training.accelerate={same}") != plain
    other = config_file(tmp_path / "elsewhere", deepspeed_config={"zero_stage": 1})
    assert settings(f"training.accelerate={first}") != settings(f"training.accelerate={other}")
