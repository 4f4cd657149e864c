"""What a failed attempt means: retry, wait, or find out whether the call, the settings or the endpoint is at fault."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

import openai

from resources.backoff import RETRIED_STATUSES, jitter, retry_after
from resources.judges.call import BrokenReplyError

Kind = Literal["again", "limited", "call", "refused", "stop"]
"""``again``: another attempt may succeed. ``limited``: it will, later. ``call``: this call can never succeed,
others can. ``refused``: this call or the settings are at fault, and no attempt will change that. ``stop``: no
call can succeed until something is fixed, unless only this call is at fault."""

THIS_CALL = re.compile(
    r"context.?length|maximum context|too long|too large|content.?filter|content.?policy|content management"
    r"|content_filter|invalid_prompt",
    re.IGNORECASE,
)
NO_MONEY = re.compile(r"insufficient_quota|insufficient.?balance|billing|exceeded your current quota", re.I)
SCHEMA = re.compile(r"response_format|json_schema|structured.?output|guided|grammar", re.IGNORECASE)
REMEDIES = {
    400: "correct decoding or structured in the judge's settings (decoding.extra, max_tokens_field, …)",
    401: "check the key in the environment variable that api_key_env names",
    402: "top up the account",
    403: "check that the key's project may use this model and endpoint",
    404: "check model and base_url",
    405: "check base_url",
    422: "correct decoding or structured in the judge's settings",
}
UNSENT = ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "ProxyError")


@dataclass(frozen=True)
class Fault:
    """Why an attempt failed. ``lost``: a reply may have been paid for but was not received."""

    kind: Kind
    message: str
    wait: float | None = None  # seconds, if the endpoint specified them
    lost: bool = False
    schema: bool = False  # the endpoint refuses the response_format
    remedy: str = ""  # if the call is not at fault


@dataclass(frozen=True)
class RetryPolicy:
    """Waits and limits. The defaults suit paid endpoints.

    Neither tenacity nor the client's own retries fit: each attempt is admitted by rate limit and budget,
    has a row in the ledger, and may turn out to be the endpoint's fault rather than the call's.
    """

    base_s: float = 1.0
    cap_s: float = 60.0
    patience_s: float = 900.0  # of 429s without any reply, before the endpoint is tested
    outage_calls: int = 16  # calls that failed without any reply meanwhile, before the endpoint is tested
    grace_s: float = 5.0  # for calls in flight when everything stops: they are paid for

    def backoff(self, attempt: int) -> float:
        """Seconds before attempt ``attempt + 1``."""
        return jitter(attempt, self.base_s, self.cap_s)


def classify(error: Exception, timeout_s: float) -> Fault | None:
    """The fault behind an attempt's exception; None: unknown, i.e. a bug."""
    if isinstance(error, BrokenReplyError):
        return Fault("again", str(error), lost=True)
    if isinstance(error, TimeoutError | openai.APITimeoutError):
        cause = type(error.__cause__).__name__
        return Fault("again", f"no reply within {timeout_s:g} s", lost=cause not in UNSENT)
    if isinstance(error, openai.APIStatusError):
        return _status_fault(error)
    if isinstance(error, openai.APIConnectionError):
        cause = type(error.__cause__).__name__
        text = f"{cause}: {error.__cause__}".rstrip(": ")
        return Fault("again", f"connection failed ({text})", lost=cause not in UNSENT)
    return None


def _status_fault(error: openai.APIStatusError) -> Fault:
    status = error.status_code
    explanation = _explanation(error)
    message = f"HTTP {status}: {explanation}"
    wait = retry_after(error.response.headers)
    if status == 413 or (status in (400, 422, 429) and THIS_CALL.search(explanation)):
        return Fault("call", message)
    if status == 429 and not NO_MONEY.search(explanation):
        return Fault("limited", message, wait)
    if status >= 500 or status in RETRIED_STATUSES:
        return Fault("again", message, wait)
    remedy = (
        REMEDIES[402] if NO_MONEY.search(explanation) else REMEDIES.get(status, "check base_url and model")
    )
    refused = status in (400, 422)
    schema = refused and SCHEMA.search(explanation) is not None
    return Fault("refused" if refused else "stop", message, schema=schema, remedy=remedy)


def _explanation(error: openai.APIStatusError) -> str:
    """The endpoint's explanation: message and code, at most 500 characters, on one line."""
    body: Any = error.body
    parts = (
        [str(body[name]) for name in ("message", "code", "param") if body.get(name)]
        if isinstance(body, dict)
        else []
    )
    text = " / ".join(parts) or str(body or error.response.reason_phrase or "no explanation")
    return " ".join(text.split())[:500]
