"""Tokenisation shared by all engines; input that does not fit a model raises before anything is computed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from resources.workers.serving import CallError
from textalign_dagster import tokenisation


class Loaded(Protocol):
    """A model that an engine has loaded."""

    folder: Path
    tokenizer: Any

    @property
    def outputs(self) -> int:
        """Number of logits."""
        ...

    @property
    def context(self) -> int | None:
        """Maximum number of tokens of prompt and completion together; None: no limit."""
        ...


class Drawn(NamedTuple):
    """A completion as token ids; an end token is the last of ``ids`` and is included in ``logprob``."""

    ids: list[int]
    ended: bool
    logprob: float


def prompts_of(loaded: Loaded, call: dict[str, Any]) -> list[list[int]]:
    """Token ids of the prompts of a "generate" call; raises `CallError` if one does not fit."""
    texts = [prompt for prompt, _ in call["requests"]]
    prompts = tokenisation.encode_prompts(loaded.tokenizer, texts)
    check(loaded, "prompt", prompts, [call["decoding"]["max_new_tokens"]] * len(prompts), texts)
    return prompts


def pairs_of(loaded: Loaded, call: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts and texts of a "logprobs" call; raises `CallError` if a pair does not fit."""
    prompt_texts = [prompt for prompt, _ in call["pairs"]]
    prompts = tokenisation.encode_prompts(loaded.tokenizer, prompt_texts)
    texts = tokenisation.encode_texts(loaded.tokenizer, [text for _, text in call["pairs"]])
    check(loaded, "pair", prompts, list(map(len, texts)), prompt_texts)
    return prompts, texts


def banned_of(loaded: Loaded, call: dict[str, Any]) -> set[int]:
    """Token ids that a call must not draw.

    Raises:
        BannedTokenError: a banned token is not one token.
    """
    # Outputs beyond the tokenizer (padding of the vocabulary) have no text.
    textless = set(range(loaded.outputs)).difference(loaded.tokenizer.get_vocab().values())
    return textless.union(tokenisation.banned_ids(loaded.tokenizer, call["decoding"]["banned_tokens"]))


def as_completions(tokenizer: Any, drawn: Iterable[Drawn]) -> list[dict[str, Any]]:
    """Each as a `sampler.Completion`, as a dictionary."""
    found = list(drawn)
    texts = tokenisation.decode(tokenizer, [one.ids[:-1] if one.ended else one.ids for one in found])
    return [
        {
            "text": text,
            "n_tokens": len(one.ids),
            "finish_reason": "stop" if one.ended else "length",
            "logprob": one.logprob,
        }
        for one, text in zip(found, texts, strict=True)
    ]


def check_embeddings(folder: Path, tokenizer: Any, embeddings: int) -> None:
    """Raises `CallError` unless every token has an embedding."""
    if len(tokenizer) > embeddings:
        raise CallError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {embeddings} "
            "embeddings; resize the model's embeddings before saving it"
        )


def check(
    loaded: Loaded, what: str, prompts: Sequence[Sequence[int]], more: Sequence[int], texts: Sequence[str]
) -> None:
    """Raises `CallError` unless each prompt has tokens and fits the context with ``more`` tokens after it."""
    for index, (prompt, extra, text) in enumerate(zip(prompts, more, texts, strict=True)):
        name = f"{what} {index} ({text[:60]!r}{'…' if len(text) > 60 else ''})"
        if not prompt:
            raise CallError(
                f"{what} {index} has an empty prompt, and the tokenizer of {loaded.folder} has no "
                "token that begins a sequence; use a prompt of at least one character"
            )
        if loaded.context is not None and len(prompt) + extra > loaded.context:
            remedy = "shorten the prompt or the text" if what == "pair" else "shorten the prompt"
            room = loaded.context - len(prompt)
            if what == "prompt" and room > 0:
                remedy += f", or lower max_new_tokens to {room}"
            raise CallError(
                f"{name} has {len(prompt)} tokens and {extra} more would follow, but "
                f"{loaded.folder} holds {loaded.context} tokens; {remedy}"
            )
