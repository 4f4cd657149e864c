"""The interface of a running training for callbacks, snapshots and saving the model.

`trainer.ObjectiveTrainer` implements it. All of them import this module, so that none imports another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor
from transformers import TrainingArguments

from training.settings import Training


@dataclass(frozen=True)
class Progress:
    """How far a training has come, over all processes and restarts."""

    step: int = 0
    losses: Sequence[float] = ()  # one per step
    tokens: int = 0
    seconds: float = 0.0  # of the steps
    resumed_at: Sequence[int] = ()  # steps at which it was resumed
    coefficients: dict[str, float] = field(default_factory=dict)  # those that adapt
    loss_scale: dict[str, float] = field(default_factory=dict)  # under fp16


class Running(Protocol):
    """The parts of a trainer that others read."""

    model: Any
    model_wrapped: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    is_deepspeed_enabled: bool
    args: TrainingArguments
    settings: Training

    before: Progress  # of the snapshot it was resumed from
    coefficients: dict[str, float]
    measured: dict[str, float]  # the objective's figures of the last step
    step_losses: list[Tensor]  # of this rank, one number per step
    tokens: int  # of this rank, padding not counted
    first_step_seconds: float | None
    snapshot_due: bool
    ending: bool

    @property
    def steps_done(self) -> int:
        """Optimizer steps so far, including those before a snapshot."""

    def progress(self) -> Progress:
        """How far the training has come; all processes must call it together."""

    def adapt(self) -> None:
        """Adapts the objective's coefficients after a step."""
