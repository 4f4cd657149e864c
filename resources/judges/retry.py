"""What to do when a call goes wrong: try again, give the call up, or stop everything."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from typing import Any, Literal

import openai

from resources.judges.call import BrokenReplyError
from resources.judges.rate_limit import retry_after

Kind = Literal["again", "limited", "call", "stop"]
"""``again``: another attempt may succeed. ``limited``: so it will, later. ``call``: this call can
never succeed, others can. ``stop``: no call can succeed before somebody mends something."""

RETRIED_STATUSES = {408, 409, 425}
THIS_CALL = re.compile(
    r"context.?length|maximum context|too long|too large|content.?filter|content.?policy|content management"
    r"|content_filter|invalid_prompt",
    re.IGNORECASE,
)
NO_MONEY = re.compile(r"insufficient_quota|insufficient.?balance|billing|exceeded your current quota", re.I)
SCHEMA = re.compile(r"response_format|json_schema|structured.?output|guided|grammar", re.IGNORECASE)
REMEDIES = {
    400: "mend decoding or structured in the judge's settings (decoding.extra, max_tokens_field, …)",
    401: "check the key in the environment variable that api_key_env names",
    402: "top up the account",
    403: "check that the key's project may use this model and endpoint",
    404: "check model and base_url",
    405: "check base_url",
    422: "mend decoding or structured in the judge's settings",
}
UNSENT = ("ConnectError", "ConnectTimeout", "PoolTimeout", "UnsupportedProtocol", "ProxyError")


@dataclass(frozen=True)
class Fault:
    """What went wrong with an attempt. ``lost``: a reply may have been paid for and not received."""

    kind: Kind
    message: str
    wait: float | None = None  # seconds, where the endpoint said so
    lost: bool = False
    schema: bool = False  # the endpoint refuses the response_format


@dataclass(frozen=True)
class RetryPolicy:
    """How to wait. The defaults suit paid endpoints.

    Attempt n waits a random time up to ``base_s * 2**(n-1)``, at most ``cap_s`` (full jitter: calls
    that failed together do not come back together).
    """

    base_s: float = 1.0
    cap_s: float = 60.0
    patience_s: float = 900.0  # without any reply, refused for the rate limit: then stop
    outage_calls: int = 16  # given up in a row, without any reply: then stop
    grace_s: float = 5.0  # for calls in flight when everything stops: they are paid for

    def backoff(self, attempt: int, draw: random.Random) -> float:
        """Seconds before attempt ``attempt + 1``."""
        return draw.uniform(0, min(self.cap_s, self.base_s * 2.0 ** min(attempt - 1, 30)))


def classify(error: Exception, timeout_s: float) -> Fault | None:
    """What an attempt's exception means; None: nothing known, a fault of the program."""
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
    said = _said(error)
    message = f"HTTP {status}: {said}"
    wait = retry_after(error.response.headers)
    if status == 429 and not NO_MONEY.search(said):
        return Fault("limited", message, wait)
    if status >= 500 or status in RETRIED_STATUSES:
        return Fault("again", message, wait)
    if status == 413 or (status in (400, 422) and THIS_CALL.search(said)):
        return Fault("call", message)
    schema = status in (400, 422) and SCHEMA.search(said) is not None
    remedy = REMEDIES[402] if NO_MONEY.search(said) else REMEDIES.get(status, "check base_url and model")
    return Fault("stop", f"{message}; {remedy}", schema=schema)


def _said(error: openai.APIStatusError) -> str:
    """The endpoint's words: message and code, at most 500 characters, in one line."""
    body: Any = error.body
    parts = (
        [str(body[name]) for name in ("message", "code", "param") if body.get(name)]
        if isinstance(body, dict)
        else []
    )
    text = " / ".join(parts) or str(body or error.response.reason_phrase or "no explanation")
    return " ".join(text.split())[:500]
