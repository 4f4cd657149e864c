"""How a checkpoint is trained: a section of the experiment, and what the trainer is told."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from textalign_dagster.settings import Settings

Beta = Annotated[float, Field(ge=0, lt=1)]


class Objective(Settings):
    """The loss per generated token: −log p + kl_coef·KL − entropy_coef·H."""

    entropy_coef: float = Field(0.06, ge=0, description="Weight of the entropy bonus (alpha).")
    kl_coef: float = Field(0.0, ge=0, description="Weight of the KL to the reference (beta); 0: none.")
    kl_direction: Literal["reference_to_policy", "policy_to_reference"] = Field(
        "reference_to_policy",
        description="reference_to_policy: KL(ref || pi) as ALT; policy_to_reference: KL(pi || ref) as Quark's code.",
    )
    kl_reference: Literal["base", "parent"] = Field(
        "base", description="The reference: the base policy, or the policy this iteration started from."
    )
    kl_reference_sees_condition: bool = Field(
        False, description="Whether the reference reads the condition too, or the plain prompt."
    )


class Training(Settings):
    """How a checkpoint is trained on the drawn rows."""

    objective: Objective = Field(Objective(), description="The loss.")
    start_from: Literal["parent", "base"] = Field(
        "parent", description="Continue the policy that was sampled from, or start from the base anew."
    )
    epochs: float = Field(2.0, gt=0, description="Passes over the drawn rows.")
    learning_rate: float = Field(2e-5, gt=0, description="Peak learning rate (AdamW).")
    schedule: Literal["linear", "cosine", "constant"] = Field(
        "linear", description="Shape of the decay, restarted every iteration."
    )
    final_lr_ratio: float = Field(
        0.0, ge=0, le=1, description="Last learning rate as a share of the peak (linear, cosine)."
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="Share of steps that warm up.")
    batch_size: int = Field(8, ge=1, description="Rows per process and step.")
    gradient_accumulation: int = Field(1, ge=1, description="Steps added up before an update.")
    weight_decay: float = Field(3e-7, ge=0, description="AdamW's weight decay.")
    betas: tuple[Beta, Beta] = Field((0.8, 0.999), strict=False, description="AdamW's betas.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon.")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Gradients are clipped to this norm; null: not at all."
    )
    max_length: int = Field(
        1024, ge=2, description="Longest row in tokens; long prompts lose their beginning."
    )
    eos_rule: Literal["finish_reason", "legacy"] = Field(
        "finish_reason",
        description="A cut-off sample must not teach stopping. finish_reason: the end token follows samples "
        "that ended by themselves; legacy: the published guess from last character and length.",
    )
    special_token_init: Literal["mean_std", "eos"] = Field(
        "mean_std",
        description="Embeddings of new tokens: normal around the vocabulary's mean and spread, or a copy of the end token's.",
    )
    processes: int = Field(1, ge=1, description="Training processes on this machine.")
