"""LoRA: small trained matrices beside frozen weights (Hu et al. 2021), through peft."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from textalign_dagster.training_settings import Lora
from training.job import JobError


def add_adapter(model: PreTrainedModel, settings: Lora, tokens: list[int], seed: int) -> Any:
    """The model with an adapter, which alone trains, and with it the rows of special tokens.

    Args:
        tokens: ids whose rows in input and output embeddings train: nothing else could teach new ones.
        seed: of the adapter's start.

    Raises:
        JobError: ``target_modules`` are not the model's.
    """
    torch.manual_seed(seed)
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [name for name, module in model.named_modules() if any(module is one for one in embeddings)]
    if embeddings[1] is not None and embeddings[0].weight is embeddings[1].weight:
        names = names[:1]  # peft follows the tie by itself
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a factor, whole or not
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        trainable_token_indices={name: sorted(set(tokens)) for name in names} if tokens else None,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise JobError(f"training.lora: {error}") from None


def merge_adapter(model: PeftModel, folder: Path | None) -> PreTrainedModel:
    """The plain model with the adapter added to its weights; the adapter alone goes to ``folder``."""
    if folder is not None:
        # The trained rows of special tokens are in it; whole embeddings would be the merged model's.
        model.save_pretrained(str(folder), save_embedding_layers=False)
    merged: PreTrainedModel = model.merge_and_unload()
    return merged
