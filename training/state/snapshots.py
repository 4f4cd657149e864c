"""Snapshots: an interrupted training resumes from them, as if it had not been interrupted.

::

    weights.safetensors         the trained weights; all others are the policy's
    optimizer.safetensors/json  AdamW's state, if all processes have the same
    process_0.safetensors, …    per process: its random generators, and under ZeRO its shard of the state
    snapshot.json               losses, tokens, seconds so far

On the CPU a resumed training gives the same bytes as an uninterrupted one.
"""

from __future__ import annotations

import hashlib
import json
import secrets
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, distributed
from transformers import PreTrainedModel

from textalign_dagster.disk import sync
from textalign_dagster.ids import canonical_json
from training.data.examples import Example
from training.job import Job, JobError
from training.progress import Reporter
from training.running import Progress, Running
from training.settings import WITHOUT_EFFECT
from training.state import zero_state
from training.state.optimizer_state import TENSORS, OptimizerState
from training.state.snapshot_folder import SnapshotName, names, publish

WEIGHTS, FACTS = "weights.safetensors", "snapshot.json"
GENERATORS, SHARE = "generator/", "zero/"
CPU, ACCELERATOR = f"{GENERATORS}cpu", f"{GENERATORS}accelerator"
SEEN = 1024  # values of each tensor that identify a model


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that a training resumes from."""

    folder: Path
    progress: Progress

    @classmethod
    def read(cls, folder: Path) -> Snapshot:
        """The snapshot in a folder.

        Raises:
            JobError: it cannot be read.
        """
        try:
            return cls(folder, Progress(**json.loads((folder / FACTS).read_text(encoding="utf-8"))))
        except (OSError, ValueError, TypeError) as error:
            raise _unreadable(folder, error) from None

    def restore_weights(self, model: PreTrainedModel) -> None:
        """Copies its weights into a model loaded as at the start of the training."""
        tensors, trained = _load(self.folder, WEIGHTS), _trained(model)
        if tensors.keys() != trained.keys():
            raise _unreadable(self.folder, ValueError("its weights are not those that are trained"))
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(tensors[name])

    @property
    def optimizer(self) -> OptimizerState | None:
        """AdamW's state; None: each process has its own shard (`restore_process`)."""
        if not (self.folder / TENSORS).exists():
            return None
        try:
            return OptimizerState.read(self.folder)
        except JobError as error:
            raise _unreadable(self.folder, error) from None

    def restore_process(self, trainer: Running) -> None:
        """Restores a process's own state and the loss scale; to be called once the trainer is set up."""
        scale = self.progress.loss_scale
        if trainer.is_deepspeed_enabled:
            kept = _load(self.folder, _of_process(trainer), SHARE)
            part = {name.removeprefix(SHARE): value for name, value in kept.items()}
            zero_state.restore(trainer.model_wrapped, part)
            zero_state.restore_loss_scale(trainer.model_wrapped, scale)
        elif trainer.accelerator.scaler is not None and scale:
            trainer.accelerator.scaler.load_state_dict(scale)

    def restore_generators(self, trainer: Running) -> None:
        """Makes dropout continue where it was; to be called right before the first step, after anything random."""
        kept, device = _load(self.folder, _of_process(trainer), GENERATORS), trainer.args.device
        torch.set_rng_state(kept[CPU])
        if ACCELERATOR in kept:
            torch.get_device_module(device).set_rng_state(kept[ACCELERATOR], device)


class Snapshots:
    """The snapshots of one training: the training resumes from the newest, and takes further ones.

    All processes take one together: after a step in which the first of them found it due by the clock,
    or any of them received SIGUSR1 (which Slurm sends before a time limit) or SIGTERM (sent to cancel or
    evict a training), in which case it is the last.
    """

    def __init__(self, folder: Path, training: str, minutes: float, reporter: Reporter, device: torch.device):
        """
        Args:
            training: identifies the training, see `identity`.
            minutes: between snapshots.

        Raises:
            JobError: the newest snapshot cannot be read.
        """
        self._folder, self._training, self._every = folder, training, 60 * minutes
        self._reporter = reporter
        self._first = not distributed.is_initialized() or distributed.get_rank() == 0
        newest = next(reversed(names(folder, training)), None) if self._first else None
        # All processes use what the first one finds and draws: another might look at another moment.
        agreed = torch.tensor(
            [newest.step if newest else -1, newest.life if newest else 0, secrets.randbits(32)], device=device
        )
        if distributed.is_initialized():
            distributed.broadcast(agreed, 0)
        step, life, self._life = agreed.tolist()
        name = SnapshotName(step, life, training)
        self.found = None if step < 0 else Snapshot.read(folder / str(name))
        self._clock = time.monotonic()
        self._signals: set[int] = set()  # received so far
        for number in (signal.SIGUSR1, signal.SIGTERM):
            signal.signal(number, lambda number, _: self._signals.add(number))

    def start(self) -> None:
        """To be called when the first step begins."""
        self._clock = time.monotonic()

    def due(self) -> bool:
        """Whether, for this process, a snapshot is due after this step."""
        return bool(self._signals) or (self._first and time.monotonic() - self._clock >= self._every)

    def ending(self) -> bool:
        """Whether this process received SIGTERM."""
        return signal.SIGTERM in self._signals

    def take(self, trainer: Running) -> None:
        """Writes a snapshot, all processes together; if that fails, the training continues without it."""
        progress, model = trainer.progress(), trainer.accelerator.unwrap_model(trainer.model)
        weights: dict[str, Tensor] = _trained(model)
        if trainer.is_deepspeed_enabled:  # it may shard them: all processes gather them together
            whole = trainer.accelerator.get_state_dict(trainer.model_wrapped) or {}
            weights = {name: whole[name] for name in weights if name in whole}
        name = SnapshotName(progress.step, self._life, self._training)
        draft = self._folder / f".{name}"
        problem = ""
        try:
            draft.mkdir(parents=True, exist_ok=True)
            _save(_process(trainer), draft / _of_process(trainer))
            if self._first:
                _save(weights, draft / WEIGHTS)
                if not trainer.is_deepspeed_enabled:
                    optimizer = trainer.optimizer.optimizer  # accelerate wraps it
                    OptimizerState.of(model, optimizer, progress.coefficients).write(draft)
                (draft / FACTS).write_text(json.dumps(asdict(progress)) + "\n", encoding="utf-8")
            for path in (*draft.iterdir(), draft):
                sync(path)
        except (OSError, SafetensorError, zero_state.NotKept) as error:
            problem = f"{type(error).__name__}: {error}"
        failed = torch.tensor(int(bool(problem)), device=trainer.args.device)
        if int(trainer.accelerator.reduce(failed, "sum")):
            problem = problem or "another process could not write its part"
        elif self._first:
            try:
                publish(self._folder, draft, name)
            except OSError as error:  # the folder was removed: the training is no longer needed, or is over
                problem = str(error)
        if problem:
            shutil.rmtree(draft, ignore_errors=True)
        self._reporter.say(
            f"no snapshot of step {name.step} in {self._folder}, the training continues ({problem})"
            if problem
            else f"wrote a snapshot of step {name.step} to {self._folder}"
        )
        self._clock = time.monotonic()
        self._signals.discard(signal.SIGUSR1)


def loss_scale(trainer: Running) -> dict[str, float]:
    """The state of the loss scaler under fp16; otherwise empty."""
    if trainer.is_deepspeed_enabled:
        return zero_state.loss_scale(trainer.model_wrapped)
    scaler = trainer.accelerator.scaler
    return {} if scaler is None else scaler.state_dict()


def identity(job: Job, models: Sequence[PreTrainedModel | None], examples: Sequence[Example]) -> str:
    """A hash of everything that determines a training.

    Args:
        models: policy and reference as loaded, before anything is trained; identified by the first values
            of each tensor.
    """
    digest = hashlib.blake2b(digest_size=12)
    agreed = job.model_dump(mode="json", include={"seed", "world_size", "sharing", "dtype"})
    settings = job.training.model_dump(mode="json", exclude=set(WITHOUT_EFFECT))
    digest.update(canonical_json([agreed, settings]).encode())
    for example in examples:
        for ids in (example.prompt, example.text, example.reference, example.second):
            digest.update(str(None if ids is None else len(ids)).encode())
            digest.update(np.asarray(ids or [], np.int64).tobytes())
        values = (example.weight, example.role, example.group, example.reward, example.sampled_log_prob)
        digest.update(repr((*values, example.scores)).encode())
    for model in models:
        for name, parameter in model.named_parameters() if model is not None else ():
            digest.update(name.encode())
            digest.update(parameter.detach().flatten()[:SEEN].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _trained(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def _process(trainer: Running) -> dict[str, Tensor]:
    """A process's own state: its random generators, and under ZeRO its shard."""
    kept, device = {CPU: torch.get_rng_state()}, trainer.args.device
    if device.type != "cpu":
        kept[ACCELERATOR] = torch.get_device_module(device).get_rng_state(device)
    if trainer.is_deepspeed_enabled:
        kept |= {SHARE + name: value for name, value in zero_state.share(trainer.model_wrapped).items()}
    return kept


def _of_process(trainer: Running) -> str:
    return f"process_{trainer.args.process_index}.safetensors"


def _save(tensors: dict[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _load(folder: Path, name: str, prefix: str = "") -> dict[str, Tensor]:
    """The tensors of a file whose names start with ``prefix``; the others, which can be large, are not read."""
    try:
        with safe_open(folder / name, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys() if key.startswith(prefix)}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise _unreadable(folder, error) from None


def _unreadable(folder: Path, error: Exception) -> JobError:
    return JobError(f"snapshots: {folder} cannot be resumed from ({error}); remove it to start over")
