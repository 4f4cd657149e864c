"""Accelerate configurations (DeepSpeed, FSDP, data parallel), shipped or the user's own, and checks that they
agree with the experiment. Everything is checked before training starts."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

from textalign_dagster.settings import SettingsError, nearest, read_yaml, write_yaml
from training.settings import Training

SHIPPED = Path(__file__).parent / "accelerate_configs"
PROBE = "import torch; print(torch.accelerator.device_count() if torch.accelerator.is_available() else 0)"

Kind = Literal["DEEPSPEED", "FSDP", "MULTI_GPU", "NO"]
KINDS = get_args(Kind)


@dataclass(frozen=True)
class AccelerateConfig:
    """An accelerate configuration; ``deepspeed`` is the content of its ``deepspeed_config_file``, if any."""

    where: str
    content: dict[str, Any]
    deepspeed: dict[str, Any] | None

    @property
    def kind(self) -> Kind:
        """Accelerate's name for how the processes share the work."""
        kind: Kind = self.content["distributed_type"]
        return kind

    @property
    def zero_stage(self) -> int | None:
        """DeepSpeed's ZeRO stage; None without DeepSpeed."""
        if self.kind != "DEEPSPEED":
            return None
        if self.deepspeed is not None:
            return int(self.deepspeed.get("zero_optimization", {}).get("stage", 0))
        return int(self.content.get("deepspeed_config", {}).get("zero_stage", 2))

    @property
    def identity(self) -> dict[str, Any]:
        """The content that determines a training, whatever the file is called."""
        fields = dict(self.content.get("deepspeed_config") or {})
        fields.pop("deepspeed_config_file", None)
        content = {**self.content, **({"deepspeed_config": fields} if fields else {})}
        if not fields:
            content.pop("deepspeed_config", None)
        return {"accelerate": content, "deepspeed": self.deepspeed}

    def write(self, folder: Path) -> Path:
        """Writes the configuration, and DeepSpeed's if any, to ``folder``; returns the file to launch with."""
        content = dict(self.content)
        if self.deepspeed is not None:
            inner = folder / "deepspeed.json"
            inner.write_text(json.dumps(self.deepspeed, indent=2) + "\n", encoding="utf-8")
            content["deepspeed_config"] = {
                **content["deepspeed_config"],
                "deepspeed_config_file": str(inner.resolve()),
            }
        path = folder / "accelerate.yaml"
        path.write_text(write_yaml(content), encoding="utf-8")
        return path


def shipped() -> tuple[str, ...]:
    """Names that ``training.accelerate`` accepts."""
    return tuple(sorted(path.stem for path in SHIPPED.glob("*.yaml")))


def accelerate_config(setting: str) -> AccelerateConfig:
    """The configuration with a shipped name, or at a path.

    Raises:
        SettingsError: it does not exist, cannot be read, or is of an unsupported kind.
    """
    path = SHIPPED / f"{setting}.yaml" if setting in shipped() else Path(setting)
    if not path.is_file():
        raise SettingsError(
            f"training.accelerate: {setting!r} is neither a file nor one of {', '.join(shipped())}"
            f"{nearest(setting, shipped())}"
        )
    content = read_yaml(path)
    kind = content.get("distributed_type")
    if kind == "MULTI_CPU":
        raise SettingsError(
            f"training.accelerate: {path}: distributed_type MULTI_CPU starts one process only; leave "
            "training.accelerate out, and training.processes are started on CPUs as well"
        )
    if kind not in KINDS:
        raise SettingsError(
            f"training.accelerate: {path}: distributed_type: {kind!r} is not supported; use one of {', '.join(KINDS)}"
        )
    if content.get("compute_environment", "LOCAL_MACHINE") != "LOCAL_MACHINE":
        raise SettingsError(
            f"training.accelerate: {path}: compute_environment: only LOCAL_MACHINE is supported"
        )
    config = AccelerateConfig(str(path), content, _deepspeed(path, content) if kind == "DEEPSPEED" else None)
    try:
        stage = config.zero_stage
    except (TypeError, ValueError):
        stage = -1
    if stage not in (None, 0, 1, 2, 3):
        raise SettingsError(
            f"training.accelerate: {path}: the ZeRO stage is not one of 0, 1, 2, 3; set it there"
        )
    return config


def _deepspeed(path: Path, content: dict[str, Any]) -> dict[str, Any] | None:
    fields = content.get("deepspeed_config")
    if not isinstance(fields, dict):
        raise SettingsError(
            f"training.accelerate: {path}: deepspeed_config: missing; set zero_stage or deepspeed_config_file there"
        )
    if "deepspeed_config_file" not in fields:
        return None
    inner = path.parent / str(fields["deepspeed_config_file"])
    try:
        given = json.loads(inner.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"training.accelerate: {path}: deepspeed_config_file: {inner} cannot be read as JSON ({error})"
        ) from None
    if not isinstance(given, dict) or not isinstance(given.get("zero_optimization"), dict):
        raise SettingsError(
            f"training.accelerate: {inner}: zero_optimization: missing; add the section, with `stage`"
        )
    return given


@lru_cache(maxsize=1)
def accelerators() -> int:
    """The number of accelerators of this machine, counted in a subprocess (torch takes seconds to import)."""
    probe = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, timeout=120)
    return int(probe.stdout) if probe.returncode == 0 else 0


def check_training(
    training: Training,
    *,
    dtype: str,
    devices: Callable[[], int] | None = accelerators,
    installed: Callable[[str], bool] = lambda package: importlib.util.find_spec(package) is not None,
) -> AccelerateConfig | None:
    """Checks that a training can start with its settings; returns its accelerate configuration, if it names one.

    Args:
        dtype: of the policy's weights.
        devices: the number of accelerators where the training will run; None: unknown here.
        installed: whether a package is installed.

    Raises:
        SettingsError: one sentence naming the field and the remedy.
    """
    config = None if training.accelerate is None else accelerate_config(training.accelerate)
    kind = None if config is None else config.kind
    if training.lora is not None and not installed("peft"):
        raise SettingsError("training.lora: needs the peft package: pip install -e '.[lora]'")
    if kind == "DEEPSPEED" and not installed("deepspeed"):
        raise SettingsError(
            f"training.accelerate: {training.accelerate} needs the deepspeed package: pip install -e '.[deepspeed]'"
        )
    if training.optimizer == "adamw_8bit":
        if not installed("bitsandbytes"):
            raise SettingsError(
                "training.optimizer: adamw_8bit needs the bitsandbytes package: pip install -e '.[8bit]'"
            )
        if kind in ("DEEPSPEED", "FSDP"):
            raise SettingsError(
                f"training.optimizer: adamw_8bit is not supported with {training.accelerate}, which keeps optimizer state "
                "in its own format; set it to adamw"
            )
    if training.mixed_precision == "fp16" and dtype == "bfloat16":
        raise SettingsError(
            "training.mixed_precision: fp16 cannot be combined with policy.dtype bfloat16; use mixed_precision "
            "bf16, or dtype float32"
        )
    if config is not None:
        for check in (_agreement, _sharing, _check_deepspeed):
            check(training, config)
    if devices is not None and (
        training.mixed_precision == "fp16" or config is not None or training.processes > 1
    ):
        _devices(training, kind, devices())
    return config


def _agreement(training: Training, config: AccelerateConfig) -> None:
    """Raises if the configuration contradicts the experiment's processes or precision."""
    expected = {
        "num_processes": ("training.processes", training.processes),
        "num_machines": ("the launcher's number of machines", training.machines),
        "mixed_precision": ("training.mixed_precision", training.mixed_precision),
        "use_cpu": ("the expected value", False),
    }
    for field, (name, value) in expected.items():
        given = config.content.get(field, value)
        if given != value and not (field == "num_processes" and given == -1):
            raise SettingsError(
                f"training.accelerate: {config.where}: {field} is {given!r}, but {name} is {value!r}; remove it "
                "there, or make them agree"
            )


def _sharing(training: Training, config: AccelerateConfig) -> None:
    kind, name = config.kind, training.accelerate
    if kind in ("FSDP", "MULTI_GPU") and training.processes < 2:
        raise SettingsError(f"training.processes: {name} needs at least 2 processes; raise it")
    if kind == "NO" and training.processes > 1:
        raise SettingsError(
            f"training.accelerate: {config.where} is for one process (distributed_type NO), but "
            f"training.processes is {training.processes}; leave training.accelerate out"
        )
    sharded = kind == "FSDP" or config.zero_stage == 3
    if training.optimizer_state == "carried" and kind in ("DEEPSPEED", "FSDP"):
        raise SettingsError(
            f"training.optimizer_state: carried is not supported with {name}, which keeps optimizer state in its own "
            "format; set it to fresh"
        )
    if training.lora is not None and sharded:
        raise SettingsError(
            f"training.lora: adapters cannot be merged into the sharded weights of {name}; use zero2"
        )
    if kind == "FSDP" and training.gradient_checkpointing:
        fsdp = config.content.get("fsdp_config") or {}
        if fsdp.get("fsdp_activation_checkpointing"):
            raise SettingsError(
                "training.gradient_checkpointing: the configuration has fsdp_activation_checkpointing; keep only one"
            )


def _check_deepspeed(training: Training, config: AccelerateConfig) -> None:
    """Raises if DeepSpeed settings other than "auto" contradict the experiment, or no checkpoint could be written."""
    if config.kind != "DEEPSPEED":
        return
    fields = config.content.get("deepspeed_config") or {}
    deepspeed = config.deepspeed if config.deepspeed is not None else fields
    for section in ("optimizer", "scheduler"):
        if section in deepspeed:
            raise SettingsError(
                f"training.accelerate: {config.where}: {section}: is set by the experiment (section training); "
                "remove it there"
            )
    batch, accumulation = training.batch_size, training.gradient_accumulation
    expected: dict[str, tuple[Any, Any]] = {
        "gradient_accumulation_steps": (deepspeed.get("gradient_accumulation_steps"), accumulation),
        "gradient_clipping": (deepspeed.get("gradient_clipping"), training.max_grad_norm or 0.0),
        "train_micro_batch_size_per_gpu": (deepspeed.get("train_micro_batch_size_per_gpu"), batch),
        "train_batch_size": (deepspeed.get("train_batch_size"), batch * accumulation * training.processes),
        **{
            f"{name}.enabled": ((deepspeed.get(name) or {}).get("enabled"), training.mixed_precision == name)
            for name in ("fp16", "bf16")
        },
    }
    for field, (given, value) in expected.items():
        if given not in (None, "auto", value):
            raise SettingsError(
                f"training.accelerate: {config.where}: {field} is {given!r}, but the section training has {value!r}; "
                'set it to "auto" there'
            )
    if config.zero_stage == 3:
        zero = deepspeed.get("zero_optimization") or {}
        if fields.get("zero3_init_flag"):
            raise SettingsError(
                f"training.accelerate: {config.where}: zero3_init_flag: new tokens cannot be added to weights that "
                "are sharded from the start; set it to false"
            )
        if not zero.get("stage3_gather_16bit_weights_on_model_save", fields.get("zero3_save_16bit_model")):
            raise SettingsError(
                f"training.accelerate: {config.where}: without stage3_gather_16bit_weights_on_model_save "
                "(zero3_save_16bit_model) no checkpoint can be written; set it to true"
            )


def _devices(training: Training, kind: Kind | None, devices: int) -> None:
    name = training.accelerate
    if devices == 0:
        if kind == "FSDP":
            raise SettingsError(
                f"training.accelerate: {name} needs accelerators, and this machine has none (on CPUs the processes "
                "would train unsynchronised copies); use zero2 or zero3"
            )
        if kind == "MULTI_GPU":
            raise SettingsError(
                f"training.accelerate: {name} needs accelerators, and this machine has none; leave it out: "
                "training.processes are then started on CPUs"
            )
        if training.mixed_precision == "fp16":
            raise SettingsError(
                "training.mixed_precision: fp16 needs an accelerator, and this machine has none; use bf16 or no"
            )
        if training.mixed_precision == "bf16" and kind == "DEEPSPEED":
            raise SettingsError(
                f"training.mixed_precision: bf16 with {name} needs an accelerator, and this machine has none; use no"
            )
    elif training.processes > devices:
        raise SettingsError(
            f"training.processes: {training.processes}, but this machine has {devices} accelerators; lower it"
        )
