"""Sampling from a policy: requests, completions and the protocol of an engine.

Nothing here uses torch. An engine (`transformers.sampler` is the embedded one) keeps a worker process
across many calls and swaps the weights when another model is requested.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from resources.workers.channel import Progress

SEED_LIMIT = 2**64


class SamplerError(RuntimeError):
    """Sampling failed; the message is one readable sentence (or two) with the remedy."""


@dataclass(frozen=True)
class Adapted:
    """A base model with a LoRA adapter (a folder that peft wrote) on top of its weights."""

    base: Path
    adapter: Path


Model = Path | Adapted
"""A transformers folder, or one with an adapter (for engines that serve adapters)."""


@dataclass(frozen=True)
class Request:
    """A prompt, which already carries its condition, and the seeds of its completions.

    There is one completion for each seed; all of them share the prefill of the prompt. A seed lies
    in ``[0, 2**64)``; the same seed with the same prompt gives the same completion.
    """

    prompt: str
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.seeds:
            raise ValueError(f"a request needs at least one seed (prompt {self.prompt!r})")
        for seed in self.seeds:
            if not 0 <= seed < SEED_LIMIT:
                raise ValueError(f"seed {seed} is outside [0, 2**64); derive it with derive_seed()")


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen.

    The order is that of transformers and vLLM: end and banned tokens are removed, the logits are
    divided by ``temperature``, ``top_k`` keeps the k most likely, ``top_p`` keeps the smallest set
    of the remaining ones with at least that mass. Tokens that tie with the last one kept are kept.
    ``structured`` is applied before all of them: tokens that it does not allow are removed.
    """

    temperature: float  # 0 is greedy
    top_p: float = 1.0  # 1 keeps all
    top_k: int = 0  # 0 keeps all
    max_new_tokens: int = 64
    min_new_tokens: int = 0  # no end token is drawn before
    ignore_eos: bool = False  # no end token is drawn at all: exactly max_new_tokens
    banned_tokens: tuple[str, ...] = ()  # each must be one token of the model's tokenizer
    structured: Mapping[str, Any] | None = None  # see `settings.structured`; None: free text

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature is {self.temperature}; use 0 (greedy) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; use a number in (0, 1], 1 keeps all tokens")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; use 0 (all tokens) or more")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; use 1 or more")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens is {self.min_new_tokens}; use a number from 0 to "
                f"max_new_tokens ({self.max_new_tokens})"
            )
        if self.structured is not None and (self.min_new_tokens or self.ignore_eos):
            raise ValueError(
                "structured output ends where its structure does; leave out min_new_tokens and ignore_eos"
            )

    @property
    def identity(self) -> dict[str, Any]:
        """The fields that identify samples, as plain JSON; ``structured`` only if set, so older keys stay valid."""
        known = {**vars(self), "banned_tokens": list(self.banned_tokens)}
        if self.structured is None:
            del known["structured"]
        return known


@dataclass(frozen=True)
class Completion:
    """The completion for one seed.

    ``text`` follows the prompt directly (leading blanks kept) and contains no special tokens.
    ``n_tokens`` counts every sampled token, the end token included when there is one: it is the
    number of terms in ``logprob``, and at most ``max_new_tokens``. ``logprob`` is the sum of the
    tokens' log-probabilities under the *model* (temperature 1, nothing removed), in nats.
    ``finish_reason`` is ``stop`` after an end token and ``length`` after ``max_new_tokens``.
    """

    text: str
    n_tokens: int
    finish_reason: Literal["stop", "length"]
    logprob: float


class Sampler(AbstractContextManager["Sampler"], Protocol):
    """An engine that samples; a context manager around its worker process."""

    engine: str
    on_accelerator: bool  # whether its worker holds what others need: GPU memory, a cluster node
    load_seconds: float  # over all calls so far: starting workers, loading models

    @property
    def engine_version(self) -> str:
        """Versions of everything that a sample depends on."""
        ...

    def generate(
        self,
        model: Model,
        requests: Sequence[Request],
        decoding: Decoding,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """The completions of every request, in the order of requests and of their seeds.

        Raises `SamplerError`, e.g. when a prompt does not fit the model's context.
        """
        ...

    def logprobs(
        self,
        model: Model,
        pairs: Sequence[tuple[str, str]],
        progress: Progress | None = None,
    ) -> list[tuple[float, int]]:
        """For each (prompt, text): log-probability of the text given the prompt (sum, in nats) and
        the text's number of tokens. The prompt's tokens and an end token are not counted.
        """
        ...

    def close(self) -> None:
        """Stop the worker and free its memory; the next call starts a new one."""
        ...
