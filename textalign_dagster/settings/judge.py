"""Settings of an LLM judge: model and endpoint, requests, rate limits, and budget."""

from __future__ import annotations

import re
from datetime import date
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import ConfigDict, Field, field_validator, model_validator

from textalign_dagster.settings import SECRET_NAME, Settings

Ask = Literal["text", "category", "judgment", "rating", "ranking", "win"]
PAIRWISE: tuple[Ask, ...] = ("ranking", "win")
GROUPWISE: tuple[Ask, ...] = ("text", "category", "rating")
SCALED: tuple[Ask, ...] = ("text", "rating")

ENVIRONMENT_NAME = re.compile(r"[A-Z_][A-Z0-9_]*")
SET_ELSEWHERE = {
    "messages": "template",
    "model": "model",
    "temperature": "decoding.temperature",
    "top_p": "decoding.top_p",
    "max_tokens": "decoding.max_tokens",
    "max_completion_tokens": "decoding.max_tokens and decoding.max_tokens_field",
    "seed": "decoding.seed",
    "response_format": "structured",
    "n": "repeats",
}
"""Fields of a request that ``decoding.extra`` must not set → the setting that does."""


class JudgeDecoding(Settings):
    """The fields of a request other than its messages; part of the key under which a reply is stored."""

    temperature: float | None = Field(
        0.0, ge=0, le=2, description="Sampling temperature; null: not sent (some models refuse it)."
    )
    top_p: float | None = Field(None, gt=0, le=1, description="Nucleus sampling; null: not sent.")
    max_tokens: int | None = Field(
        512,
        ge=1,
        description="Longest reply in tokens; null: the endpoint's own limit (then budget_usd "
        "cannot be used, because a call's maximum price is unknown).",
    )
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = Field(
        "max_tokens",
        description="What the endpoint calls max_tokens. OpenAI's reasoning models require "
        "max_completion_tokens.",
    )
    seed: int | None = Field(None, description="Sent unchanged; endpoints guarantee little. null: not sent.")
    extra: dict[str, Any] = Field(
        default_factory=dict,
        description="Further fields of the request, e.g. {reasoning_effort: low}, as the endpoint "
        "documents them.",
    )

    @field_validator("extra")
    @classmethod
    def _extra(cls, extra: dict[str, Any]) -> dict[str, Any]:
        for name in extra:
            if name in SET_ELSEWHERE:
                raise ValueError(f"{name!r} is set by {SET_ELSEWHERE[name]}")
            if name in ("stream", "stream_options"):
                raise ValueError(f"{name!r} cannot be used: replies are read whole")
        for path in _secret_paths(extra):
            raise ValueError(
                f"{path!r} looks like a secret, and settings are written to disk: "
                "put the key into an environment variable and name it in api_key_env"
            )
        return extra

    def params(self) -> dict[str, Any]:
        """The request's fields, without model, messages and response_format."""
        named = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            self.max_tokens_field: self.max_tokens,
            "seed": self.seed,
        }
        return {name: value for name, value in named.items() if value is not None} | self.extra


class JudgeLimits(Settings):
    """Rates, timeouts and attempts."""

    requests_per_minute: int | None = Field(
        None,
        ge=1,
        description="The account's limit; null: only the limits that the endpoint's responses report.",
    )
    tokens_per_minute: int | None = Field(
        None, ge=1, description="The account's limit, input and output together; null: as above."
    )
    concurrency: int = Field(64, ge=1, le=4096, description="Maximum number of calls in flight.")
    timeout_s: float = Field(
        120.0, gt=0, description="Seconds until a call without a complete reply is retried."
    )
    attempts: int = Field(
        6,
        ge=1,
        le=100,
        description="Requests for one call before it counts as failed; the last one is only sent once the endpoint "
        "answers other calls. Rate-limit responses (429) do not count.",
    )


class JudgePrices(Settings):
    """USD per million tokens."""

    input: float = Field(..., ge=0, description="Price of a million input tokens, USD.")
    cached_input: float | None = Field(
        None,
        ge=0,
        description="Price of a million input tokens that the endpoint had cached; null: as `input`.",
    )
    output: float = Field(..., ge=0, description="Price of a million output tokens, USD.")
    as_of: str = Field(..., description="Date of these prices, YYYY-MM-DD.")

    @field_validator("as_of")
    @classmethod
    def _as_of(cls, as_of: str) -> str:
        try:
            date.fromisoformat(as_of)
        except ValueError:
            raise ValueError(f"{as_of!r} is not a date; write it as 2026-01-31") from None
        return as_of

    def usd(self, tokens_in: float, tokens_out: float, tokens_cached: float = 0) -> float:
        """The price of a call; ``tokens_in`` includes ``tokens_cached``, whatever an endpoint reports."""
        cached = self.input if self.cached_input is None else self.cached_input
        tokens_cached = min(tokens_cached, tokens_in)
        fresh = tokens_in - tokens_cached
        return (fresh * self.input + tokens_cached * cached + tokens_out * self.output) / 1e6


class JudgeBatch(Settings):
    """Judging through the Batch API: cheaper, and answered within a day."""

    window: Literal["24h"] = Field("24h", description="Time within which the endpoint promises replies.")
    price_factor: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Price of a batched call relative to a live one; see the endpoint's price list.",
    )
    requests: int = Field(
        50_000, ge=1, description="Maximum number of calls in one batch; more are split into several."
    )
    poll_s: float = Field(
        60.0,
        gt=0,
        description="Seconds between polls while `textalign run` waits; the sensor has its own interval.",
    )


class JudgeScale(Settings):
    """The range of a judge's numbers, instead of its template's."""

    low: float = Field(..., strict=False, description="The worst number.")
    high: float = Field(..., strict=False, description="The best number.")

    @model_validator(mode="after")
    def _ordered(self) -> JudgeScale:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low:g}) must be below high ({self.high:g})")
        return self


class Judge(Settings):
    """An LLM that judges samples, behind any endpoint with OpenAI's chat completions API."""

    # A key pasted into the wrong field must not show up in an error message.
    model_config = ConfigDict(hide_input_in_errors=True)

    model: str = Field(
        ...,
        min_length=1,
        description="The model's snapshot, e.g. gpt-4o-mini-2024-07-18 rather than an alias.",
    )
    base_url: str = Field(
        "https://api.openai.com/v1", description="The endpoint's URL, without /chat/completions."
    )
    api_key_env: str | None = Field(
        "OPENAI_API_KEY",
        description="The NAME of the environment variable with the key; null: none (local servers).",
    )
    template: str = Field(
        ..., min_length=1, description="The question: the name of a shipped template, or the path of a file."
    )
    ask: Ask = Field(
        "text",
        description="What the judge replies: text (feedback in words), category, judgment (words and verdict), "
        "rating (a number), ranking (the better of two), win (the better of two, in both orders).",
    )
    scale: JudgeScale | None = Field(
        None,
        description="`ask: text` and `ask: rating`: the range of numbers, e.g. {low: 1, high: 10}; null: the "
        "template's. The template's examples are rescaled.",
    )
    group: int = Field(
        1,
        ge=1,
        description="Responses to one prompt that are judged in one call (`ask: text`, `category`, `rating`): "
        "fewer calls, and longer replies (see decoding.max_tokens).",
    )
    pairs: int | None = Field(
        None,
        ge=1,
        description="`ask: ranking`: pairs of samples compared for each prompt, drawn so that all samples are in "
        "about equally many; null: all k(k-1)/2 pairs of k samples. A pair takes two calls.",
    )
    decoding: JudgeDecoding = Field(default_factory=JudgeDecoding, description="How the judge decodes.")
    structured: Literal["auto", "json_schema", "off"] = Field(
        "auto",
        description="Whether replies are constrained to a JSON schema, if the template has one: "
        "json_schema: always; off: never; auto: unless the endpoint rejects it.",
    )
    limits: JudgeLimits = Field(default_factory=JudgeLimits, description="Rates, timeouts, attempts.")
    prices: JudgePrices | None = Field(
        None,
        description="Prices of the model; null: calls cost nothing (local servers) or costs are not tracked.",
    )
    budget_usd: float | None = Field(
        None, ge=0, description="Maximum cost of one batch of calls in USD; it stops before the call that would "
        "exceed it, and can be resumed. null: no limit."
    )  # fmt: skip
    batch: JudgeBatch | None = Field(
        None,
        description="Use the endpoint's Batch API: `batch: {}`; null: live calls. Stored replies serve both.",
    )
    repeats: int = Field(
        1,
        ge=1,
        description="How often each question is asked; values are averaged, labels decided by vote. Not for "
        "comparisons. Without randomness (temperature 0), repeats add little.",
    )

    @field_validator("base_url")
    @classmethod
    def _base_url(cls, base_url: str) -> str:
        parts = urlsplit(base_url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("not a URL; write it like https://api.openai.com/v1")
        if parts.username or parts.password:
            raise ValueError(
                "the URL carries credentials; put the key into an environment variable and name it in "
                "api_key_env"
            )
        if parts.query or parts.fragment:
            raise ValueError("the URL has a part after '?' or '#'; remove it")
        if parts.path.rstrip("/").endswith("/chat/completions"):
            raise ValueError("remove /chat/completions: it is added automatically")
        return base_url

    @field_validator("api_key_env")
    @classmethod
    def _api_key_env(cls, name: str | None) -> str | None:
        if name is not None and not ENVIRONMENT_NAME.fullmatch(name):
            raise ValueError(
                "this is the NAME of an environment variable, in capitals, such as OPENAI_API_KEY; the key "
                "itself belongs in that variable and in no file (if you have saved one here, replace it)"
            )
        return name

    @model_validator(mode="after")
    def _priced(self) -> Judge:
        if self.budget_usd is not None:
            if self.prices is None:
                raise ValueError("budget_usd needs prices: add input, output and as_of")
            if self.decoding.max_tokens is None:
                raise ValueError("budget_usd needs decoding.max_tokens: a call's maximum price is unknown")
        return self

    @model_validator(mode="after")
    def _askable(self) -> Judge:
        if self.group > 1 and self.ask not in GROUPWISE:
            raise ValueError(
                f"group: `ask: {self.ask}` judges one item per call; groups are for {', '.join(GROUPWISE)}: remove it"
            )
        if self.pairs is not None and self.ask != "ranking":
            raise ValueError(f"pairs: only `ask: ranking` compares samples; with `ask: {self.ask}` remove it")
        if self.repeats > 1 and self.ask in PAIRWISE:
            raise ValueError(
                f"repeats: `ask: {self.ask}` already asks every comparison twice, once in each order: remove it"
            )
        if self.scale is not None and self.ask not in SCALED:
            raise ValueError(
                f"scale: `ask: {self.ask}` returns no numbers; scales are for {', '.join(SCALED)}: remove it"
            )
        return self

    @property
    def endpoint(self) -> str:
        """The endpoint as recorded and hashed: without credentials, normalised."""
        parts = urlsplit(self.base_url)
        port = "" if parts.port in (None, 443 if parts.scheme == "https" else 80) else f":{parts.port}"
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        return f"{parts.scheme}://{host}{port}{parts.path.rstrip('/')}"


def _secret_paths(value: Any, path: str = "") -> list[str]:
    if isinstance(value, dict):
        return [
            found
            for name, item in value.items()
            for found in (
                [f"{path}{name}"]
                if SECRET_NAME.search(str(name)) and isinstance(item, str)
                else _secret_paths(item, f"{path}{name}.")
            )
        ]
    if isinstance(value, list):
        return [found for item in value for found in _secret_paths(item, path)]
    return []
