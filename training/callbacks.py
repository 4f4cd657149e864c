"""Trainer callbacks: they adapt coefficients, report progress and take snapshots."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerCallback

from training.job import EndedError
from training.progress import Reporter
from training.running import Running
from training.state.snapshots import Snapshots

REPORT_EVERY = 0.5  # seconds


class Adaptation(TrainerCallback):
    """Adapts the coefficients after every step."""

    def __init__(self, trainer: Running):
        self._trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._trainer.adapt()


class Reporting(TrainerCallback):
    """Reports progress at most every ``REPORT_EVERY`` seconds, and always at the first and last step."""

    def __init__(self, trainer: Running, reporter: Reporter):
        self._trainer, self._reporter = trainer, reporter
        self._time, self._step, self._tokens, self._lr = time.monotonic(), 0, 0, 0.0

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._lr = float(self._trainer.lr_scheduler.get_last_lr()[0])  # of this step, before it changes

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._time = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now, trainer = time.monotonic(), self._trainer
        if state.global_step == 1:
            trainer.first_step_seconds = now - self._time
        if now - self._time < REPORT_EVERY and state.global_step not in (1, state.max_steps):
            return
        # Rank 0 extrapolates to all ranks: its loss and its tokens, times their number.
        ranks = trainer.accelerator.num_processes
        recent = torch.stack(trainer.step_losses[self._step :]).mean().item() * ranks
        rate = (trainer.tokens - self._tokens) * ranks / max(now - self._time, 1e-9)
        self._reporter.progress(
            {
                "done": trainer.steps_done,
                "total": trainer.before.step + state.max_steps,
                "loss": recent,
                "tokens_per_s": rate,
                "lr": self._lr,
                **trainer.measured,
                **trainer.coefficients,
            }
        )
        self._time, self._step, self._tokens = now, state.global_step, trainer.tokens


class Snapshotting(TrainerCallback):
    """Makes a trainer resume from a snapshot and take new ones."""

    def __init__(self, trainer: Running, snapshots: Snapshots):
        self._trainer, self._snapshots = trainer, snapshots
        self._found = snapshots.found

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._found is not None:
            self._found.restore_process(self._trainer)
        self._snapshots.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._found is not None:
            self._found.restore_generators(self._trainer)
        self._found = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._trainer.snapshot_due and state.global_step < state.max_steps:
            self._snapshots.take(self._trainer)
            if self._trainer.ending:
                raise EndedError("the training was stopped by SIGTERM")
