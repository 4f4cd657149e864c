"""How a checkpoint is trained: a section of the experiment, and part of the trainer's job."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from textalign_dagster.settings import Settings
from textalign_dagster.settings.clusters import Slurm
from textalign_dagster.settings.kubernetes import Kubernetes
from training.objectives import NLL, AnyObjective

Beta = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=0)]


DEFAULT_LENGTH = 1024
"""Longest row in tokens where `max_length` is not set and the model's own limit is not lower."""

WITHOUT_EFFECT = ("gradient_checkpointing", "snapshot_minutes", "launcher", "slurm", "k8s")
"""Settings that do not change the result of a training: a step is the same on other machines, and recomputed
activations are the same activations."""


class Lora(Settings):
    """Trains small matrices on top of the frozen weights, and merges them at the end."""

    rank: int = Field(16, ge=1, description="Rank of the matrices.")
    alpha: float = Field(32.0, gt=0, description="The matrices are scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on their input.")
    target_modules: Literal["all-linear"] | list[str] = Field(
        "all-linear",
        description="Names of the modules they are added to; all-linear: every linear module but the LM head.",
    )
    adapter: Literal["new", "carried"] = Field(
        "new",
        description="new: each iteration trains a new adapter on top of the policy it starts from; carried: one "
        "adapter on top of the base policy is trained further in every iteration.",
    )


class DensityRatio(Settings):
    """Weights each sample by how much more likely it is under the policy than under the one that drew it."""

    clip: tuple[float, float] = Field(
        (0.1, 10.0), strict=False, description="Smallest and largest ratio; others are clipped to these."
    )
    per: Literal["sequence", "token"] = Field(
        "sequence",
        description="sequence: the ratio of whole texts; token: the geometric mean over their tokens, with less variance.",
    )

    @field_validator("clip")
    @classmethod
    def _rising(cls, clip: tuple[float, float]) -> tuple[float, float]:
        if not 0 < clip[0] < clip[1]:
            raise ValueError(f"{list(clip)}: the smallest ratio comes first, above 0 and below the largest")
        return clip


class Training(Settings):
    """How a checkpoint is trained on the drawn rows."""

    objective: AnyObjective = Field(
        NLL(), description="The loss; `name` is one that the method supports, by default its first."
    )
    density_ratio: DensityRatio | None = Field(
        None,
        description="Weights samples of earlier iterations, or of a file, by the ratio of their probabilities under the "
        "policy that the training starts from and under the one that drew them; null: no weighting; {}: the defaults.",
    )
    start_from: Literal["parent", "base"] = Field(
        "parent", description="Continue from the policy that was sampled from, or restart from the base."
    )
    epochs: float = Field(2.0, gt=0, description="Passes over the drawn rows.")
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate.")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="Shape of the decay, restarted every iteration."
    )
    final_lr_ratio: float = Field(
        0.0, ge=0, le=1, description="Final learning rate as a share of the peak (linear, cosine)."
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Share of steps spent on warm-up.")
    batch_size: int = Field(8, ge=1, description="Rows per process and step.")
    gradient_accumulation: int = Field(1, ge=1, description="Steps accumulated before an update.")
    block: int | None = Field(
        None,
        ge=2,
        description="Tokens per block, for a corpus: documents are concatenated, each after an end token, and cut into "
        "blocks of this length; `batch_size` counts blocks.",
    )
    packing: bool = Field(
        False,
        description="Whether a process reads the rows of a step as one sequence, in which they do not attend to each "
        "other, instead of padding them to the longest one.",
    )
    optimizer: Literal["adamw", "adamw_8bit"] = Field(
        "adamw",
        description="adamw_8bit: AdamW with 8-bit moments (bitsandbytes), a quarter of the memory.",
    )
    weight_decay: float = Field(3e-7, ge=0, description="AdamW's weight decay.")
    betas: tuple[Beta, Beta] = Field((0.8, 0.999), strict=False, description="AdamW's betas.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    optimizer_state: Literal["fresh", "carried"] = Field(
        "fresh",
        description="carried: AdamW's moments (and adapted coefficients) continue from the previous iteration.",
    )
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Gradients are clipped to this norm; null: no clipping."
    )
    trainable_layers: Count | Share | None = Field(
        None,
        description="How many of the last transformer blocks are trained: a number (8), or a share of them (0.3); "
        "null: all. Embeddings, final norm and LM head are always trained.",
    )
    lora: Lora | None = Field(
        None,
        description="Trains low-rank adapters instead of all weights, merged into the checkpoint; null: none.",
    )
    max_length: int | None = Field(
        None,
        ge=2,
        description="Longest row in tokens; longer prompts lose their beginning. null: the model's maximum, up to 1024.",
    )
    eos_rule: Literal["finish_reason", "legacy"] = Field(
        "finish_reason",
        description="Truncated samples must not teach stopping. finish_reason: the end token is appended to samples "
        "that ended by themselves; legacy: the published heuristic on last character and length.",
    )
    special_token_init: Literal["mean_std", "eos"] = Field(
        "mean_std",
        description="Initial embeddings of new tokens: normal with the vocabulary's mean and standard deviation, or a copy "
        "of the end token's.",
    )
    mixed_precision: Literal["no", "bf16", "fp16"] = Field(
        "no", description="Precision of forward and backward passes; fp16 needs an accelerator."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations instead of keeping them: slower, but uses less memory."
    )
    accelerate: str | None = Field(
        None,
        description="How processes share the work: zero1, zero2, zero2_offload, zero3, fsdp, multi_gpu, or the "
        "path of an accelerate configuration; null: plain data parallel.",
    )
    processes: int = Field(
        1, ge=1, description="Total number of training processes, over all nodes; one per GPU."
    )
    snapshot_minutes: float | None = Field(
        15.0,
        gt=0,
        description="Minutes between snapshots, from which an interrupted training resumes; null: no snapshots, it "
        "restarts.",
    )
    launcher: Literal["local", "slurm", "k8s"] = Field(
        "local",
        description="Where trainings run: on this machine, as Slurm jobs (docs/clusters.md), or as Kubernetes pods.",
    )
    slurm: Slurm = Field(Slurm(), description="The job, if the launcher is slurm.")
    k8s: Kubernetes = Field(Kubernetes(), description="The pod, if the launcher is k8s.")

    @field_validator("objective", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        """``objective: dpo`` is short for ``objective: {name: dpo}``; without a name it is ``nll``."""
        if isinstance(value, str):
            return {"name": value}
        return {"name": "nll", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _on_nodes(self) -> Training:
        pod = self.k8s
        if self.launcher == "k8s":
            pod.check_complete()
            if pod.gpus and self.processes != pod.gpus:
                raise ValueError(
                    f"processes: {self.processes}, but k8s.gpus is {pod.gpus}; set it to {pod.gpus}, one per GPU"
                )
        nodes, gpus = self.slurm.nodes, self.slurm.gpus_per_node
        if self.launcher != "slurm":
            return self
        if self.processes % nodes:
            raise ValueError(
                f"processes: {self.processes} cannot be spread evenly over slurm.nodes: {nodes}; make it a "
                f"multiple of {nodes}"
            )
        if gpus and self.processes != nodes * gpus:
            raise ValueError(
                f"processes: {self.processes}, but slurm requests {nodes} nodes with {gpus} GPUs each; set it to "
                f"{nodes * gpus}, one per GPU"
            )
        return self

    @property
    def carries_adapter(self) -> bool:
        """Whether one adapter on top of the base policy is trained across all iterations."""
        return self.lora is not None and self.lora.adapter == "carried"

    @property
    def adapts_base(self) -> bool:
        """Whether every checkpoint is the base policy with an adapter."""
        return self.lora is not None and (self.carries_adapter or self.start_from == "base")

    @property
    def machines(self) -> int:
        """The number of machines that the processes run on."""
        return self.slurm.nodes if self.launcher == "slurm" else 1

    @model_validator(mode="after")
    def _possible(self) -> Training:
        if self.density_ratio is not None:
            name, needs = self.objective.name, self.objective.needs
            if "score head" in needs:
                raise ValueError(
                    f"density_ratio: {name} trains a reward model, which does not sample; remove it"
                )
            if {"groups", "rewards"} <= needs:
                raise ValueError(f"density_ratio: the loss of {name} already includes this ratio; remove it")
        if self.lora is not None and self.trainable_layers is not None:
            raise ValueError("lora, trainable_layers: adapters leave every block frozen; remove one of them")
        if self.carries_adapter and self.start_from == "base":
            raise ValueError(
                "lora.adapter: carried continues from the parent's adapter, but start_from: base starts without one; "
                "set start_from to parent, or lora.adapter to new"
            )
        if self.optimizer_state == "carried":
            if self.optimizer == "adamw_8bit":
                raise ValueError(
                    "optimizer_state: 8-bit moments (optimizer: adamw_8bit) cannot be carried over; set it to fresh"
                )
            if self.lora is not None and not self.carries_adapter:
                raise ValueError(
                    "optimizer_state: carried moments belong to the same weights, but each iteration has a new "
                    "adapter (lora.adapter: new); set it to fresh, or lora.adapter to carried"
                )
            if self.start_from == "base":
                raise ValueError(
                    "optimizer_state: carried moments belong to the parent's weights; set start_from to parent"
                )
        return self
