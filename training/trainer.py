"""HF Trainer with our objective, our batches and our learning-rate schedule.

Everything else (devices, mixed precision, distributed data parallel, DeepSpeed) is left to Trainer.
"""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from training.callbacks import Adaptation, Reporting, Snapshotting
from training.data.batches import TOKEN_VALUES, Collator, Examples
from training.forward import head_outputs, labelled_tokens
from training.job import NonFiniteError
from training.objectives.base import Objective, Sequences, Step
from training.objectives.tokens import Tokens, restrict
from training.progress import Reporter
from training.running import Progress
from training.settings import Training
from training.state.optimizer_state import OptimizerState
from training.state.snapshots import Snapshots, loss_scale


def lr_factor(
    step: int,
    total: int,
    warmup: int,
    schedule: Literal["linear", "cosine", "constant"],
    final: float,
) -> float:
    """The learning rate of a step (0, 1, …) as a fraction of the peak.

    It rises linearly from 0 in ``warmup`` steps and then falls to ``final`` after the last step
    (with ``final`` 0 like transformers' schedules of the same names); ``constant`` stays at 1.
    """
    if step < warmup:
        return step / warmup
    if schedule == "constant":
        return 1.0
    gone = min(1.0, (step - warmup) / max(1, total - warmup))
    shape = 1 - gone if schedule == "linear" else 0.5 * (1 + math.cos(math.pi * gone))
    return final + (1 - final) * shape


def training_arguments(
    settings: Training, *, out: str, seed: int, cpu: bool, deepspeed: bool = False
) -> TrainingArguments:
    """The part of the job that Trainer handles itself.

    One "epoch" of the Trainer is our whole plan (batches.plan_batches), all epochs included. Values
    that a DeepSpeed configuration leaves "auto" (clipping, batch sizes, precision) are filled in by
    Trainer from here.
    """
    arguments = TrainingArguments(
        output_dir=out,
        num_train_epochs=1,
        per_device_train_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.gradient_accumulation,
        optim="adamw_8bit" if settings.optimizer == "adamw_8bit" else "adamw_torch_fused",
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.betas[0],
        adam_beta2=settings.betas[1],
        adam_epsilon=settings.eps,
        max_grad_norm=settings.max_grad_norm or 0.0,
        bf16=settings.mixed_precision == "bf16",
        fp16=settings.mixed_precision == "fp16",
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        seed=seed % 2**32,  # numpy accepts no larger seeds
        # With use_cpu, accelerate would silently train without DeepSpeed.
        use_cpu=cpu and not deepspeed,
        # With one process, naming a backend makes accelerate look for a process group that does not exist.
        ddp_backend="gloo" if cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        ddp_find_unused_parameters=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        logging_nan_inf_filter=False,
    )
    # One process drives one device: with several visible GPUs Trainer would otherwise wrap the
    # model in DataParallel, which neither our loss weights nor the world size account for.
    arguments._n_gpu = min(1, arguments.n_gpu)
    return arguments


class ObjectiveTrainer(Trainer):
    """Minimises the objective's total divided by its mass, both summed over the whole optimizer step.

    The mass covers all micro-batches of the gradient accumulation and all ranks. (A mean of
    their means would give tokens of short micro-batches more weight.)
    """

    loss_is_scaled_for_ga = True

    def __init__(
        self,
        *,
        model: PreTrainedModel,
        args: TrainingArguments,
        examples: Examples,
        plan: list[list[list[list[int]]]],
        collator: Collator,
        settings: Training,
        vocabulary: int,
        reporter: Reporter,
        reference: PreTrainedModel | None = None,
        carried: OptimizerState | None = None,
        snapshots: Snapshots | None = None,
    ):
        """
        Args:
            plan: of all steps, including those done before a snapshot.
            vocabulary: entries from this index on are dropped before the KL (added tokens, padding).
            reference: frozen, on any device; None if the objective reads one in every step: the model
                itself without its adapter.
            carried: the state that the optimizer and the adapted coefficients continue from; None: a fresh start.
            snapshots: the snapshots to resume from and to add to; None: neither.
        """
        found = snapshots.found if snapshots is not None else None
        self.before = found.progress if found is not None else Progress()
        if found is not None:
            found.restore_weights(model)
            carried = found.optimizer
        super().__init__(model=model, args=args, train_dataset=cast(Any, examples), data_collator=collator)
        self.remove_callback(PrinterCallback)
        self.add_callback(Adaptation(self))
        self.add_callback(Reporting(self, reporter))
        if snapshots is not None:
            self.add_callback(Snapshotting(self, snapshots))
        self._examples, self._plan = examples, plan[self.before.step :]
        self._snapshots, self.snapshot_due, self.ending = snapshots, False, False
        self.settings, self._vocabulary = settings, vocabulary
        self._carried = carried
        self.objective: Objective = settings.objective
        self.coefficients = self.objective.start()
        for earlier in (carried.coefficients if carried is not None else {}, self.before.coefficients):
            self.coefficients |= {name: earlier[name] for name in self.coefficients if name in earlier}
        self.measured: dict[str, float] = {}  # the objective's figures of the last step
        self.weighing: dict[str, float] = {}  # figures of density ratios
        self.reference = cast(Any, reference)
        if self.reference is not None:
            self.reference.to(args.device).eval().requires_grad_(False)
        self.began = time.monotonic()
        self.tokens = 0  # of this rank, padding not counted
        self.first_step_seconds: float | None = None  # includes choosing and compiling kernels
        self.step_losses: list[Tensor] = []  # of this rank, one number per step

    def get_train_dataloader(self) -> DataLoader[Any]:
        """This rank's micro-batches; not sharded by accelerate, which would repeat rows to even out the ranks."""
        batches = [micro_batch[self.args.process_index] for step in self._plan for micro_batch in step]
        examples = cast(Any, self._examples)
        return DataLoader(examples, batch_sampler=batches, collate_fn=self.data_collator)

    def create_optimizer(self, model: Any = None) -> Any:
        created = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if created and self._carried is not None:
            self._carried.restore(cast(PreTrainedModel, self.model), optimizer)
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        settings, before = self.settings, self.before.step
        total = before + num_training_steps
        warmup = math.ceil(settings.warmup_ratio * total)
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            cast(torch.optim.Optimizer, optimizer or self.optimizer),
            lambda step: lr_factor(before + step, total, warmup, settings.schedule, settings.final_lr_ratio),
        )
        return self.lr_scheduler

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of a step, and the step's mass over all ranks."""
        samples = [next(epoch_iterator) for _ in range(num_batches)]
        sums = torch.zeros(5, dtype=torch.float32)
        for batch in samples:
            weights = batch["weights"]
            mass = self.objective.mass(_sequences(batch))
            sums[:3] += torch.stack([mass, weights.sum(), (weights > 0).sum()])
            self.tokens += batch["tokens"]
        if self._snapshots is not None:
            sums[3], sums[4] = self._snapshots.due(), self._snapshots.ending()
        self.step_losses.append(torch.zeros((), device=device))
        self._sums: dict[str, Tensor] = {}
        mass, weight, rows, due, ending = self.accelerator.reduce(sums.to(device), "sum")
        self._step = mass, weight, rows
        self.snapshot_due, self.ending = bool(due > 0), bool(ending > 0)
        self._before = self._before_step(samples, mass) if "mismatched" in self.objective.needs else {}
        return samples, mass

    @torch.no_grad()
    def _before_step(self, samples: list[Any], mass: Tensor) -> dict[str, float]:
        """What the objective measures before a step, as means over the whole step."""
        model = cast(Any, self.model_wrapped)
        model.eval()  # no dropout
        sums: dict[str, Tensor] = {}
        for batch in samples:
            inputs = self._prepare_inputs(batch)
            tokens = labelled_tokens(model, inputs, "second_")
            if "second_reference_log_probs" in inputs:
                reference = inputs["second_reference_log_probs"].to(tokens.log_probs.dtype)
                tokens = tokens._replace(reference_log_probs=reference)
            for name, part in self.objective.before_step(tokens, _sequences(inputs)).items():
                sums[name] = sums.get(name, 0) + part
        model.train()
        totals = self.accelerator.reduce(torch.stack(list(sums.values())), "sum") / mass
        return dict(zip(sums, totals.tolist(), strict=True))

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Moves inputs to the device; DeepSpeed's half precision is for the model, not for the objective's inputs."""
        prepared: dict[str, Any] = super()._prepare_inputs(inputs)
        exact = (*Sequences._fields, *TOKEN_VALUES)
        return prepared | {name: inputs[name].to(self.args.device) for name in exact if name in inputs}

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        assert num_items_in_batch is not None, "get_batch_samples returns the step's mass"
        coefficients = self.coefficients | self._before
        loss = self.objective.loss(self._tokens(model, inputs), _sequences(inputs), coefficients)
        share = loss.total / num_items_in_batch
        for name, part in loss.parts.items():
            self._sums[name] = self._sums.get(name, 0) + part
        self.step_losses[-1] += share.detach()
        if not torch.isfinite(share):
            raise NonFiniteError(
                f"the loss is {share.item()} at step {self.steps_done + 1}; lower "
                "training.learning_rate (or max_grad_norm), or train in float32"
            )
        # Distributed data parallel averages the ranks' gradients; we need their sum.
        return share * self.accelerator.num_processes

    def _tokens(self, model: Any, inputs: dict[str, Any]) -> Tokens:
        """The policy's log-probabilities, and whatever else the objective needs."""
        needs = self.objective.needs
        if "score head" in needs:
            return head_outputs(model, inputs)
        tokens = labelled_tokens(model, inputs, "")
        given: dict[str, Tensor] = {}
        if "reference" in needs:
            prefix = "reference_" if "reference_input_ids" in inputs else ""
            with torch.no_grad(), self._reference(model) as reference:
                log_probs = labelled_tokens(reference, inputs, prefix).log_probs
            given["reference"] = restrict(
                log_probs, min(self._vocabulary, log_probs.shape[-1], tokens.log_probs.shape[-1])
            )
        if "token scores" in needs:
            given["scores"] = inputs["scores"].to(tokens.log_probs.dtype)
        if "reference log-probs" in needs:
            given["reference_log_probs"] = inputs["reference_log_probs"].to(tokens.log_probs.dtype)
        return tokens._replace(**given)

    @contextmanager
    def _reference(self, model: Any) -> Iterator[Any]:
        """The reference: a separate model, or the policy without its adapter."""
        if self.reference is not None:
            yield self.reference
            return
        bare = getattr(model, "module", model)
        bare.eval()  # no dropout
        with bare.disable_adapter():
            yield bare
        bare.train()

    def adapt(self) -> None:
        """Sums the objective's parts over all ranks, and adapts its coefficients."""
        if self._sums:
            parts = torch.stack([part.to(self.args.device) for part in self._sums.values()])
            sums = dict(zip(self._sums, self.accelerator.reduce(parts, "sum").tolist(), strict=True))
            step = Step(*(float(value) for value in self._step))
            self.coefficients, self.measured = self.objective.adapt(self.coefficients, sums, step)

    @property
    def steps_done(self) -> int:
        """Optimizer steps so far, including those before a snapshot."""
        return self.before.step + self.state.global_step

    def progress(self) -> Progress:
        """How far the training has come; all processes must call it together."""
        losses = self.accelerator.reduce(torch.stack(self.step_losses), "sum")
        tokens = self.accelerator.reduce(torch.tensor(self.tokens, device=self.args.device), "sum")
        resumed_at = [*self.before.resumed_at, *([self.before.step] if self.before.step else [])]
        return Progress(
            step=self.steps_done,
            losses=[*self.before.losses, *map(float, losses)],
            tokens=self.before.tokens + int(tokens),
            seconds=self.before.seconds + time.monotonic() - self.began,
            resumed_at=resumed_at,
            coefficients=self.coefficients,
            loss_scale=loss_scale(self),
        )

    @property
    def rows(self) -> int:
        """Rows trained on."""
        return len(self._examples)

    @property
    def sizes(self) -> dict[str, int]:
        """The number of parameters, and of those that are trained; sharded weights count in full."""
        sizes = {p: int(getattr(p, "ds_numel", p.numel())) for p in cast(Any, self.model).parameters()}
        trained = sum(size for p, size in sizes.items() if p.requires_grad)
        return {"parameters": sum(sizes.values()), "trained_parameters": trained}

    def peak_memory(self) -> dict[str, int | None]:
        """The most bytes that any one process has held so far, of host and of accelerator memory."""
        device = self.args.device
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss
        held = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit]
        if device.type != "cpu":
            held.append(torch.accelerator.max_memory_allocated(device))
        most = torch.tensor([held], dtype=torch.int64, device=device)
        host, *accelerator = self.accelerator.gather(most).amax(0).tolist()
        return {"host_bytes": host, "accelerator_bytes": accelerator[0] if accelerator else None}


def _sequences(batch: dict[str, Any]) -> Sequences:
    return Sequences(*(batch[name] for name in Sequences._fields))
