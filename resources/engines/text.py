"""Text to tokens before a model, as all engines do it; what does not fit is an error before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from resources.workers.serving import CallError
from textalign_dagster import tokenisation


class Loaded(Protocol):
    """A model that an engine has at hand."""

    folder: Path
    tokenizer: Any

    @property
    def outputs(self) -> int:
        """Number of logits."""
        ...

    @property
    def context(self) -> int | None:
        """Tokens that a prompt and its completion can have together; None: any number."""
        ...


def prompts_of(loaded: Loaded, call: dict[str, Any]) -> list[list[int]]:
    """Token ids of the prompts of a call "generate"; raises `CallError` where one does not fit."""
    texts = [prompt for prompt, _ in call["requests"]]
    prompts = tokenisation.encode_prompts(loaded.tokenizer, texts)
    check(loaded, "prompt", prompts, [call["decoding"]["max_new_tokens"]] * len(prompts), texts)
    return prompts


def pairs_of(loaded: Loaded, call: dict[str, Any]) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the prompts and of the texts of a call "logprobs"; raises `CallError` likewise."""
    words = [prompt for prompt, _ in call["pairs"]]
    prompts = tokenisation.encode_prompts(loaded.tokenizer, words)
    texts = tokenisation.encode_texts(loaded.tokenizer, [text for _, text in call["pairs"]])
    check(loaded, "pair", prompts, list(map(len, texts)), words)
    return prompts, texts


def banned_of(loaded: Loaded, call: dict[str, Any]) -> set[int]:
    """Ids that a call must not draw.

    Raises:
        BannedTokenError: a banned token is not one token.
    """
    # Outputs beyond the tokenizer (padding of the vocabulary) have no text.
    wordless = set(range(loaded.outputs)).difference(loaded.tokenizer.get_vocab().values())
    return wordless.union(tokenisation.banned_ids(loaded.tokenizer, call["decoding"]["banned_tokens"]))


def check_embeddings(folder: Path, tokenizer: Any, embeddings: int) -> None:
    """Every token has an embedding."""
    if len(tokenizer) > embeddings:
        raise CallError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens, the model {embeddings} "
            "embeddings; resize the model's embeddings before saving it"
        )


def check(
    loaded: Loaded, what: str, prompts: Sequence[Sequence[int]], more: Sequence[int], words: Sequence[str]
) -> None:
    """Every prompt has tokens, and fits the model's context together with ``more`` tokens."""
    for index, (prompt, extra, text) in enumerate(zip(prompts, more, words, strict=True)):
        name = f"{what} {index} ({text[:60]!r}{'…' if len(text) > 60 else ''})"
        if not prompt:
            raise CallError(
                f"{what} {index} has an empty prompt, and the tokenizer of {loaded.folder} has no "
                "token that begins a sequence; give a prompt of at least one character"
            )
        if loaded.context is not None and len(prompt) + extra > loaded.context:
            remedy = "shorten the prompt or the text" if what == "pair" else "shorten the prompt"
            room = loaded.context - len(prompt)
            if what == "prompt" and room > 0:
                remedy += f", or lower max_new_tokens to {room}"
            raise CallError(
                f"{name} has {len(prompt)} tokens and {extra} more are to follow, but "
                f"{loaded.folder} holds {loaded.context} tokens; {remedy}"
            )
