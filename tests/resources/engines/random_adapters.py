"""Random LoRA adapters with a large effect, and the same adapters merged into their model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from resources.engines.sampler import Adapted
from tests.resources.engines import tiny_models


@dataclass(frozen=True)
class Adapter:
    served: Adapted
    merged: Path


def save_adapter(
    base: Path, folder: Path, seed: int, rank: int = 3, targets: str | list[str] = "all-linear"
) -> Adapter:
    """Save an adapter on top of a model that uses the tokenizer of `tiny_models`."""
    import peft

    model = AutoModelForCausalLM.from_pretrained(base)
    config = peft.LoraConfig(r=rank, lora_alpha=2.0 * rank, target_modules=targets, task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(seed)
    for name, weights in wrapped.named_parameters():
        if "lora_" in name:
            weights.data = 0.4 * torch.randn_like(weights)
    wrapped.save_pretrained(folder / "adapter")
    wrapped.merge_and_unload().save_pretrained(folder / "merged")
    tiny_models.tokenizer().save_pretrained(folder / "merged")
    return Adapter(Adapted(base, folder / "adapter"), folder / "merged")
