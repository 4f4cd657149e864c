"""Rate limits of an endpoint: token buckets, and the rate-limit headers of its responses.

Nothing here waits: methods return seconds, so that tests can use a fake clock. `aiolimiter` does not fit: it
allows up to twice the rate within a minute, and cannot correct an estimate or give back what was not sent.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping

from resources.backoff import finite

WINDOW_S = 60.0  # limits are per minute
BURST_S = 2.0  # this many seconds' worth may be sent at once; the rate is lowered to compensate
MAX_PAUSE_S = 60.0  # from headers other than Retry-After: these often give the time until a full refill
DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
SECONDS = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


class TokenBucket:
    """At most ``per_minute`` requests in any 60 seconds; first come, first served.

    In general: at most capacity + t · rate units in any t seconds after a grant, whatever their
    size; a request for more than the bucket holds is granted once the deficit is refilled.
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate = per_minute / (WINDOW_S + BURST_S)  # units per second
        self.capacity = max(self.rate * BURST_S, min(1.0, per_minute))
        self._clock = clock
        self._balance = self.capacity
        self._at = clock()

    def take(self, units: float) -> float:
        """Take units; returns the seconds until they are granted."""
        self._refill()
        self._balance -= units
        return max(0.0, -self._balance) / self.rate

    def give_back(self, units: float) -> None:
        """Correct an estimate: ``units`` were taken but not used (negative: used in addition)."""
        self._refill()
        self._balance = min(self.capacity, self._balance + units)

    def _refill(self) -> None:
        now = self._clock()
        self._balance = min(self.capacity, self._balance + (now - self._at) * self.rate)
        self._at = now


class RateLimit:
    """The limits of one endpoint: requests and tokens per minute, and pauses it requested."""

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
        """Reserve a request of about this many tokens (input and output); returns the seconds until it may be sent."""
        waits = [0.0]
        if self._requests is not None:
            waits.append(self._requests.take(1))
        if self._tokens is not None:
            waits.append(self._tokens.take(tokens))
        return max(waits)

    def correct(self, tokens: float, used: float) -> None:
        """A request reserved with ``tokens`` used ``used``."""
        if self._tokens is not None:
            self._tokens.give_back(tokens - used)

    def give_back(self, tokens: float) -> None:
        """A reserved request will not be sent."""
        if self._requests is not None:
            self._requests.give_back(1)
        self.correct(tokens, 0)

    def pause(self, seconds: float) -> None:
        """Send no request for this long."""
        self._resume_at = max(self._resume_at, self._clock() + seconds)

    def paused(self) -> float:
        """Seconds until requests may be sent again."""
        return max(0.0, self._resume_at - self._clock())

    def heed(self, headers: Mapping[str, str], tokens: float) -> None:
        """Pause when the headers say that the next request, of about ``tokens``, would be refused."""
        for unit, need in (("requests", 1.0), ("tokens", tokens)):
            left = finite(headers.get(f"x-ratelimit-remaining-{unit}"))
            reset = duration(headers.get(f"x-ratelimit-reset-{unit}"))
            if left is None or reset is None or left >= need:
                continue
            # The reset is the time until the bucket is full again; one request needs only part of it.
            limit = finite(headers.get(f"x-ratelimit-limit-{unit}"))
            missing = min(1.0, (need - left) / (limit - left)) if limit is not None and limit > left else 1.0
            self.pause(min(reset * missing, MAX_PAUSE_S))


def duration(text: str | None) -> float | None:
    """Seconds in ``6m0s``, ``20ms``, ``1h2m``, ``1.5``; None for anything else."""
    if text is None:
        return None
    text = text.strip()
    if DURATION.sub("", text) == "" and text:
        return sum(float(number) * SECONDS[unit] for number, unit in DURATION.findall(text))
    return finite(text)
