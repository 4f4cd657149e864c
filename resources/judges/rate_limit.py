"""Keeping within an endpoint's limits: token buckets, and what its answers say about them.

Nothing here waits: methods return seconds, so that a fake clock can drive them.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

WINDOW_S = 60.0  # limits are per minute
BURST_S = 2.0  # so many seconds' worth may go at once; the rate is lowered to make up for it
MAX_PAUSE_S = 60.0  # asked for by headers other than Retry-After, which often mean a full refill
DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class TokenBucket:
    """At most ``per_minute`` requests in any 60 seconds; first come, first served.

    In general: at most capacity + t · rate units in any t seconds after a grant, whatever their
    size; what exceeds the bucket is granted when its debt will have been paid back.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = per_minute / (WINDOW_S + BURST_S)  # units per second
        self.capacity = max(self.rate * BURST_S, min(1.0, per_minute))
        self._clock = clock
        self._balance = self.capacity
        self._at = clock()

    def take(self, units: float) -> float:
        """Take units; the seconds until they are granted."""
        self._refill()
        self._balance -= units
        return max(0.0, -self._balance) / self.rate

    def give_back(self, units: float) -> None:
        """Correct an estimate: ``units`` were taken and not used (negative: used beside)."""
        self._refill()
        self._balance = min(self.capacity, self._balance + units)

    def _refill(self) -> None:
        now = self._clock()
        self._balance = min(self.capacity, self._balance + (now - self._at) * self.rate)
        self._at = now


class RateLimit:
    """The limits of one endpoint: requests and tokens per minute, and pauses that it asked for."""

    def __init__(
        self,
        requests_per_minute: float | None,
        tokens_per_minute: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._requests = TokenBucket(requests_per_minute, clock) if requests_per_minute else None
        self._tokens = TokenBucket(tokens_per_minute, clock) if tokens_per_minute else None
        self._clock = clock
        self._resume_at = clock()

    def take(self, tokens: float) -> float:
        """Enter a request of about so many tokens (input and output); seconds until it may be sent."""
        waits = [0.0]
        if self._requests is not None:
            waits.append(self._requests.take(1))
        if self._tokens is not None:
            waits.append(self._tokens.take(tokens))
        return max(waits)

    def correct(self, tokens: float, used: float) -> None:
        """A request entered with ``tokens`` has used ``used``."""
        if self._tokens is not None:
            self._tokens.give_back(tokens - used)

    def give_back(self, tokens: float) -> None:
        """A request that was entered will not be sent."""
        if self._requests is not None:
            self._requests.give_back(1)
        self.correct(tokens, 0)

    def pause(self, seconds: float) -> None:
        """No request for so long."""
        self._resume_at = max(self._resume_at, self._clock() + seconds)

    def paused(self) -> float:
        """Seconds until requests may be sent again."""
        return max(0.0, self._resume_at - self._clock())

    def heed(self, headers: Mapping[str, str], tokens: float) -> None:
        """Pause when an answer says that the next request, of about ``tokens``, would be refused."""
        for unit, need in (("requests", 1.0), ("tokens", tokens)):
            left = _number(headers.get(f"x-ratelimit-remaining-{unit}"))
            reset = duration(headers.get(f"x-ratelimit-reset-{unit}"))
            if left is None or reset is None or left >= need:
                continue
            # The reset is the time until the bucket is full again, of which one request is a part.
            limit = _number(headers.get(f"x-ratelimit-limit-{unit}"))
            missing = min(1.0, (need - left) / (limit - left)) if limit is not None and limit > left else 1.0
            self.pause(min(reset * missing, MAX_PAUSE_S))


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds that an answer asks to wait (``Retry-After``, a number or a date); None: nothing said."""
    exact = _number(headers.get("retry-after-ms"))
    if exact is not None:
        return max(0.0, exact / 1000)
    text = headers.get("retry-after")
    seconds = _number(text)
    if seconds is not None or text is None:
        return seconds if seconds is None else max(0.0, seconds)
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return max(0.0, (at - (now or datetime.now(UTC))).total_seconds())


def duration(text: str | None) -> float | None:
    """Seconds in ``6m0s``, ``20ms``, ``1h2m``, ``1.5``; None for anything else."""
    if text is None:
        return None
    text = text.strip()
    if DURATION.sub("", text) == "" and text:
        return sum(float(number) * SECONDS[unit] for number, unit in DURATION.findall(text))
    return _number(text)


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else None
    except ValueError:
        return None
    return value if value is not None and abs(value) < float("inf") else None  # NaN compares false
