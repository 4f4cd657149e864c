"""The transformers folder a policy is: loading it, and saving one that every engine can load."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from training.job import JobError, NonFiniteError
from training.trainer import ObjectiveTrainer


def load_model(folder: str, dtype: str) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True
        )
    except Exception as error:  # config, safetensors and transformers each have errors of their own
        raise JobError(
            f"{folder}: the model cannot be loaded ({_first_line(error)}); is the folder complete?"
        ) from error


def load_tokenizer(folder: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise JobError(
            f"{folder}: the tokenizer cannot be loaded ({_first_line(error)}); save it with the model"
        ) from error


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def save(trainer: ObjectiveTrainer, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """The model as a transformers folder; no optimizer state, no pickle."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    broken = next((name for name, p in model.named_parameters() if not torch.isfinite(p).all()), None)
    if broken is not None:
        raise NonFiniteError(f"after the last step {broken} is not finite; lower training.learning_rate")
    # Sharded weights are gathered by all ranks together.
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    model.config.use_cache = True  # Trainer turns it off for training; samplers need it
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        if model.generation_config is not None and getattr(model.generation_config, name) is None:
            setattr(model.generation_config, name, getattr(tokenizer, name))
    if trainer.args.process_index == 0:
        model.save_pretrained(out, state_dict=state)
        tokenizer.save_pretrained(out)
        for weights in out.glob("*.safetensors"):  # written for the owner only; be as open as the rest
            weights.chmod((out / "config.json").stat().st_mode)
    trainer.accelerator.wait_for_everyone()
