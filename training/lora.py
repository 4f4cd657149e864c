"""LoRA: small trained matrices beside frozen weights (Hu et al. 2021), through peft."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import SafetensorError
from transformers import PreTrainedModel

from training.job import JobError
from training.settings import Lora


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
    # Names of score heads: a new head has to train as a whole.
    heads = [name for name in ("score", "classifier", "classification_head") if hasattr(model, name)]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # a factor, whole or not
        lora_dropout=settings.dropout,
        target_modules=settings.target_modules,
        trainable_token_indices={name: sorted(set(tokens)) for name in names} if tokens else None,
        task_type="SEQ_CLS" if heads else "CAUSAL_LM",
        modules_to_save=heads or None,
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise JobError(f"training.lora: {error}") from None


def continue_adapter(model: PreTrainedModel, settings: Lora, tokens: list[int], folder: Path) -> Any:
    """The model with the adapter that an earlier training left in ``folder``, which trains on.

    Args:
        tokens: ids whose rows train, as in :func:`add_adapter`. Rows that were trained replace the model's.

    Raises:
        JobError: the adapter cannot be read, or is none of this kind or of this model.
    """
    where = f"adapter: {folder}"
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise JobError(f"{where} cannot be read ({error}); train the iteration before again") from None
    indices: Any = getattr(config, "trainable_token_indices", None) or {}
    found = {
        "rank": getattr(config, "r", None),
        "alpha": getattr(config, "lora_alpha", None),
        "dropout": getattr(config, "lora_dropout", None),
    }
    for name, value in found.items():
        if value != getattr(settings, name):
            raise JobError(
                f"{where} has {name} {value}, but training.lora.{name} is {getattr(settings, name)}; give both the "
                "same, or begin a new adapter"
            )
    if any(list(rows) != sorted(set(tokens)) for rows in indices.values()) or bool(tokens) != bool(indices):
        raise JobError(f"{where} was trained with other special tokens; begin a new adapter")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")  # they would begin anew
            return PeftModel.from_pretrained(model, folder, is_trainable=True, config=config)
    except (RuntimeError, ValueError, SafetensorError, UserWarning) as error:
        said = " ".join(str(error).split())[:300]
        raise JobError(
            f"{where} does not fit the policy ({said}); give the policy that it was trained on"
        ) from None


def merge_adapter(model: PeftModel, folder: Path | None) -> PreTrainedModel:
    """The plain model with the adapter added to its weights; the adapter alone goes to ``folder``."""
    if folder is not None:
        # The trained rows of special tokens are in it; whole embeddings would be the merged model's.
        model.save_pretrained(str(folder), save_embedding_layers=False)
    merged: PreTrainedModel = model.merge_and_unload()
    return merged
