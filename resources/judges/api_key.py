"""The API key of a judge: read from the environment, sent to the endpoint, never stored or logged."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import httpx2
import openai

from textalign_dagster.settings.judge import Judge

HIDDEN = "[key]"
OPENAI = "https://api.openai.com/"
SECRET_FROM = 8  # characters; masking a shorter key could change words in replies
Text = TypeVar("Text", str, str | None)


class ApiKeyError(Exception):
    """The environment holds no usable key; the message names the variable."""


class ApiKey:
    """The key that ``judge.api_key_env`` names, if it names one."""

    def __init__(self, judge: Judge) -> None:
        self._value: str | None = None
        if judge.api_key_env is None:
            return
        self._value = os.environ.get(judge.api_key_env, "").strip()
        if not self._value:
            raise ApiKeyError(
                f"the environment variable {judge.api_key_env} (api_key_env of judge {judge.model}) is not "
                "set: put the key there, or set api_key_env: null for an endpoint without keys"
            )
        if not self._value.isascii() or not self._value.isprintable() or " " in self._value:
            raise ApiKeyError(f"the value of the environment variable {judge.api_key_env} is not a valid key")

    def __repr__(self) -> str:
        return "ApiKey()" if self._value is None else f"ApiKey({HIDDEN})"

    def hide(self, text: Text) -> Text:
        """The text with the key masked: endpoints repeat it in errors. A placeholder ("none") is not a secret."""
        if not text or not self._value or len(self._value) < SECRET_FROM:
            return text
        return text.replace(self._value, HIDDEN)

    def headers(self, judge: Judge) -> dict[str, Any]:
        """Headers of every request: removes those that the library should not send."""
        # The library reads these from the environment, for any endpoint.
        foreign = [] if judge.base_url.startswith(OPENAI) else ["OpenAI-Organization", "OpenAI-Project"]
        unsent = [*foreign, *(["Authorization"] if self._value is None else [])]
        return {name: openai.Omit() for name in unsent}

    def client(self, judge: Judge, connections: int) -> openai.AsyncOpenAI:
        """The client of a batch; it does not retry by itself."""
        return openai.AsyncOpenAI(
            api_key=self._value or "none",
            base_url=judge.base_url,
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(
                limits=httpx2.Limits(max_connections=connections, max_keepalive_connections=connections),
                timeout=judge.limits.timeout_s,
                follow_redirects=False,  # a redirected POST becomes a GET
            ),
        )

    def blocking_client(self, judge: Judge) -> openai.OpenAI:
        """For the few requests of the Batch API, which are harmless to repeat."""
        return openai.OpenAI(
            api_key=self._value or "none",
            base_url=judge.base_url,
            default_headers=self.headers(judge),
            max_retries=4,
            timeout=judge.limits.timeout_s,
        )
