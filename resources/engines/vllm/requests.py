"""Requests to vLLM, in this process or on a server, and its replies as text."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol

from resources.engines.text import Drawn, Loaded, as_completions, banned_of
from resources.workers.serving import CallError
from textalign_dagster import tokenisation
from textalign_dagster.settings.structured import WHERE

LOWEST_TEMPERATURE, HIGHEST_TEMPERATURE = 0.01, 2.0  # the range that vLLM samples at; 0 is greedy


class VllmModel(Loaded, Protocol):
    """A model served by vLLM."""

    settings: dict[str, Any]
    end_ids: tuple[int, ...]


def end_ids_of(folder: Path, tokenizer: Any) -> tuple[int, ...]:
    """The end tokens of a model's folder; they are passed to vLLM, which looks for none itself."""
    from transformers import GenerationConfig

    generation = None
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
    return tokenisation.end_ids(tokenizer, generation)


def decoding(model: VllmModel, options: dict[str, Any]) -> dict[str, Any]:
    """The sampling parameters that all requests of a call share, except for banned tokens.

    Raises:
        CallError: vLLM would silently use another temperature.
    """
    temperature = options["temperature"]
    if temperature and not LOWEST_TEMPERATURE <= temperature <= HIGHEST_TEMPERATURE:
        raise CallError(
            f"temperature is {temperature:g}, but vLLM samples at 0 (greedy) or from "
            f"{LOWEST_TEMPERATURE:g} to {HIGHEST_TEMPERATURE:g}; choose one of these, or engine transformers"
        )
    return {
        "temperature": temperature,
        "top_k": options["top_k"],
        "top_p": options["top_p"],
        "max_tokens": options["max_new_tokens"],
        # With ignore_eos, no end token may be drawn before the last position, so none is drawn at all.
        "min_tokens": options["max_new_tokens" if options["ignore_eos"] else "min_new_tokens"],
        "ignore_eos": True,  # the end tokens are those of `tokenisation`, as stop_token_ids
        "stop_token_ids": list(model.end_ids),
        "logprobs": 0,  # the drawn token's own, under the model
    }


def structure(model: VllmModel, options: dict[str, Any]) -> dict[str, Any] | None:
    """The structure of completions, as fields of vLLM's `StructuredOutputsParams`; None: free text.

    Raises:
        CallError: the model has no end token.
    """
    if options["structured"] is None:
        return None
    if not model.end_ids:
        raise CallError(
            f"{model.folder}: structured output ends with an end token, and its tokenizer has none; give it one, "
            f"or leave out {WHERE}"
        )
    ((kind, content),) = options["structured"].items()
    return {"json" if kind == "json_schema" else kind: content}


def banned(model: VllmModel, call: dict[str, Any]) -> set[int]:
    """Token ids that a call must not draw.

    Raises:
        BannedTokenError: a banned token is not one token.
    """
    found = banned_of(model, call)
    if call["decoding"]["structured"] is not None:
        # A grammar treats special tokens as the characters of their names, which are not in a completion's text.
        special = {i for i, token in model.tokenizer.added_tokens_decoder.items() if token.special}
        found |= special.union(model.tokenizer.all_special_ids).difference(model.end_ids)
    return found


def seed_of(seed: int) -> int:
    """A seed in [0, 2**64), reduced to vLLM's range, the non-negative signed 64-bit numbers."""
    return seed % 2**63


def completions(model: VllmModel, call: dict[str, Any], drawn: Iterable[Drawn]) -> list[list[dict[str, Any]]]:
    """For each request of a "generate" call, one `sampler.Completion` per seed, as a dictionary."""
    rows = iter(as_completions(model.tokenizer, drawn))
    return [[next(rows) for _ in seeds] for _, seeds in call["requests"]]


def finite(model: VllmModel, logprob: float) -> float:
    """The log-probability; raises `CallError` if it is not finite."""
    if not math.isfinite(logprob):
        raise CallError(
            f"{model.folder}: the model's logits are not finite; its training has diverged, or its values "
            f"overflow in {model.settings['dtype']}"
        )
    return logprob
