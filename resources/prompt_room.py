"""Whether prompts fit a model, told before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from resources.worker_process import CallError


class Loaded(Protocol):
    """A model in memory."""

    folder: Path

    @property
    def context(self) -> int | None:
        """Tokens that a prompt and its completion can have together; None: any number."""
        ...


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
