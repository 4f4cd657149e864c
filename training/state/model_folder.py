"""A policy's transformers folder: loading it, and saving one that every engine can load."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from training import value_head
from training.job import JobError, NonFiniteError
from training.running import Running
from training.state.optimizer_state import OptimizerState


def load_model(folder: str, dtype: str) -> PreTrainedModel:
    return _load(AutoModelForCausalLM, folder, dtype)


def load_reward_model(folder: str, dtype: str, padding: int, seed: int) -> PreTrainedModel:
    """The model with a new score head of one output, initialised by the seed, in place of the LM head.

    Args:
        padding: id of the padding token: the head reads the last token that is not padding.
    """
    torch.manual_seed(seed)
    model = _load(AutoModelForSequenceClassification, folder, dtype, num_labels=1)
    model.config.pad_token_id = model.config.get_text_config().pad_token_id = padding
    return model


def _load(kind: Any, folder: str, dtype: str, **options: Any) -> PreTrainedModel:
    try:
        return cast(
            PreTrainedModel,
            kind.from_pretrained(
                folder, dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True, **options
            ),
        )
    except Exception as error:  # config, safetensors and transformers each have their own errors
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


def save(trainer: Running, tokenizer: PreTrainedTokenizerBase, out: Path, beside: Path | None = None) -> None:
    """Saves the model as a plain transformers folder, without pickle.

    What is not part of it goes to ``beside``: the optimizer state if the next iteration continues
    from it, and the adapter that has been merged into the weights.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    # Sharded weights are gathered by all ranks together.
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    carried = trainer.settings.optimizer_state == "carried"
    broken = next((name for name, weight in (state or {}).items() if not torch.isfinite(weight).all()), None)
    if broken is not None:
        raise NonFiniteError(f"after the last step {broken} is not finite; lower training.learning_rate")
    main = trainer.args.process_index == 0
    if beside is not None and main:
        beside.mkdir(parents=True, exist_ok=True)
    if state:
        value_head.take_out(state, beside if main and carried else None)
    if beside is not None and main and carried:
        optimizer = trainer.optimizer.optimizer  # accelerate wraps it
        OptimizerState.of(model, optimizer, trainer.coefficients).write(beside)
    if trainer.settings.lora is not None:
        from training.lora import merge_adapter

        model = merge_adapter(model, beside / "adapter" if beside is not None and main else None)
        state = model.state_dict()
    model.config.use_cache = True  # Trainer turns it off for training; samplers need it
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        generation = getattr(model, "generation_config", None)  # a reward model generates nothing
        if generation is not None and getattr(generation, name) is None:
            setattr(generation, name, getattr(tokenizer, name))
    if main:
        model.save_pretrained(out, state_dict=_tied(model, state))
        tokenizer.save_pretrained(out)
        # Saved as readable by the owner only; match the other files.
        for weights in out.glob("*.safetensors"):
            weights.chmod((out / "config.json").stat().st_mode)
    trainer.accelerator.wait_for_everyone()


def _tied(model: PreTrainedModel, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state with one tensor per weight: DeepSpeed copies tied weights, and both copies would be saved."""
    first: dict[torch.nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        kept = first.setdefault(parameter, name)
        if name in state and kept in state:
            state[name] = state[kept]
    return state
