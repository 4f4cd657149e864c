"""The state that DeepSpeed's ZeRO keeps in each process: its shard of the master weights and moments.

DeepSpeed's own checkpoints are pickled, so they are neither written nor read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLAT = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups")
"""Attributes in which ZeRO-3, and ZeRO-1 and -2, hold a process's shard of the master weights."""


class NotKept(Exception):
    """This DeepSpeed's state cannot be accessed; the message says why."""


def share(engine: Any) -> dict[str, Tensor]:
    """This process's master weights and AdamW state, as ``{part}`` and ``{part}/{kind}``.

    Raises:
        NotKept: the engine is of an unsupported kind.
    """
    tensors: dict[str, Tensor] = {}
    for part, flat in enumerate(_flats(engine)):
        tensors[f"{part}"] = flat.detach().cpu().clone()
        for kind, value in engine.optimizer.optimizer.state.get(flat, {}).items():
            tensors[f"{part}/{kind}"] = torch.as_tensor(value).detach().cpu().clone()
    return tensors


def restore(engine: Any, kept: dict[str, Tensor]) -> None:
    """Restores the state that `share` returned for an earlier engine in one that has just started."""
    for part, flat in enumerate(_flats(engine)):
        with torch.no_grad():
            flat.copy_(kept[f"{part}"])
        state = {name.partition("/")[2]: value for name, value in kept.items() if name.startswith(f"{part}/")}
        engine.optimizer.optimizer.state[flat] = {
            # DeepSpeed's own AdamW counts steps as a plain number, torch's as a float tensor.
            kind: int(value) if value.dtype == torch.int64 else value.to(flat.device)
            for kind, value in state.items()
        }


def loss_scale(engine: Any) -> dict[str, float]:
    """The state of the loss scaler under fp16: the scale, and when it changes next."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {name: value for name, value in vars(scaler or object).items() if isinstance(value, int | float)}


def restore_loss_scale(engine: Any, kept: dict[str, float]) -> None:
    """Restores what `loss_scale` returned."""
    for name, value in kept.items():
        setattr(engine.optimizer.loss_scaler, name, value)


def _flats(engine: Any) -> list[Tensor]:
    flats = next(filter(None, (getattr(engine.optimizer, name, None) for name in FLAT)), None)
    if not flats or any(flat is None for flat in flats):
        raise NotKept(f"this DeepSpeed's {type(engine.optimizer).__name__} does not support snapshots")
    return list(flats)
