"""LoRA: small trained matrices on top of frozen weights (Hu et al. 2021), using peft."""

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
    """The model with an adapter; only the adapter and the rows of special tokens are trained.

    Args:
        tokens: ids whose rows in input and output embeddings are trained: new ones could not be learned otherwise.
        seed: of the adapter's initialisation.

    Raises:
        JobError: the model does not have the ``target_modules``.
    """
    torch.manual_seed(seed)
    embeddings = [model.get_input_embeddings(), model.get_output_embeddings()]
    names = [name for name, module in model.named_modules() if any(module is one for one in embeddings)]
    if embeddings[1] is not None and embeddings[0].weight is embeddings[1].weight:
        names = names[:1]  # peft handles the tie itself
    # Score heads: a new head has to be trained as a whole.
    heads = [name for name in ("score", "classifier", "classification_head") if hasattr(model, name)]
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # need not be an integer
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
    """The model with the adapter that an earlier training saved in ``folder``, to be trained further.

    Args:
        tokens: ids whose rows are trained, as in :func:`add_adapter`. Rows trained before replace the model's.

    Raises:
        JobError: the adapter cannot be read, or does not fit the settings or the model.
    """
    where = f"adapter: {folder}"
    try:
        config = LoraConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError) as error:
        raise JobError(f"{where} cannot be read ({error}); train the previous iteration again") from None
    indices: Any = getattr(config, "trainable_token_indices", None) or {}
    found = {
        "rank": getattr(config, "r", None),
        "alpha": getattr(config, "lora_alpha", None),
        "dropout": getattr(config, "lora_dropout", None),
    }
    for name, value in found.items():
        if value != getattr(settings, name):
            raise JobError(
                f"{where} has {name} {value}, but training.lora.{name} is {getattr(settings, name)}; make them "
                "agree, or start a new adapter"
            )
    if any(list(rows) != sorted(set(tokens)) for rows in indices.values()) or bool(tokens) != bool(indices):
        raise JobError(f"{where} was trained with other special tokens; start a new adapter")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Found missing adapter keys")  # they would be reinitialised
            return PeftModel.from_pretrained(model, folder, is_trainable=True, config=config)
    except (RuntimeError, ValueError, SafetensorError, UserWarning) as error:
        reason = " ".join(str(error).split())[:300]
        raise JobError(
            f"{where} does not fit the policy ({reason}); use the policy that it was trained on"
        ) from None


def merge_adapter(model: PeftModel, folder: Path | None) -> PreTrainedModel:
    """The plain model with the adapter merged into its weights; the adapter itself is saved to ``folder``."""
    if folder is not None:
        # It includes the trained rows of special tokens; whole embeddings would be the merged model's.
        model.save_pretrained(str(folder), save_embedding_layers=False)
    merged: PreTrainedModel = model.merge_and_unload()
    return merged
