"""What DeepSpeed's ZeRO keeps of a training, process by process: its part of master weights and moments.

DeepSpeed's own checkpoints are pickled, so they are neither written nor read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLAT = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
"""Where ZeRO-3, and ZeRO-1 and -2, hold a process' part of the master weights."""


class NotKept(Exception):
    """The state of this DeepSpeed is unknown; the message says why."""


def share(engine: Any) -> dict[str, Tensor]:
    """This process' master weights and AdamW state, as ``{part}`` and ``{part}/{kind}``.

    Raises:
        NotKept: the engine is of a kind that is not known here.
    """
    found: dict[str, Tensor] = {}
    for part, flat in enumerate(_flats(engine)):
        found[f"{part}"] = flat.detach().cpu().clone()
        for kind, value in engine.optimizer.optimizer.state.get(flat, {}).items():
            found[f"{part}/{kind}"] = torch.as_tensor(value).detach().cpu().clone()
    return found


def restore(engine: Any, kept: dict[str, Tensor]) -> None:
    """Gives an engine that has just started the state that `share` took from another one."""
    for part, flat in enumerate(_flats(engine)):
        with torch.no_grad():
            flat.copy_(kept[f"{part}"])
        state = {name.partition("/")[2]: value for name, value in kept.items() if name.startswith(f"{part}/")}
        engine.optimizer.optimizer.state[flat] = {
            # DeepSpeed's own AdamW counts steps in a plain number, torch's in a tensor of floats.
            kind: int(value) if value.dtype == torch.int64 else value.to(flat.device)
            for kind, value in state.items()
        }


def loss_scale(engine: Any) -> dict[str, float]:
    """How far the loss is scaled under fp16, and when that changes next."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {name: value for name, value in vars(scaler or object).items() if isinstance(value, int | float)}


def restore_loss_scale(engine: Any, kept: dict[str, float]) -> None:
    """Sets what `loss_scale` returned."""
    for name, value in kept.items():
        setattr(engine.optimizer.loss_scaler, name, value)


def _flats(engine: Any) -> list[Tensor]:
    flats = next(filter(None, (getattr(engine.optimizer, name, None) for name in FLAT)), None)
    if not flats or any(flat is None for flat in flats):
        raise NotKept(f"of the {type(engine.optimizer).__name__} of this DeepSpeed no snapshot can be taken")
    return list(flats)
