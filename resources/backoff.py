"""Retrying HTTP requests: which statuses, and how long to wait. Shared by the judges and the endpoints engine."""

from __future__ import annotations

import random
from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

RETRIED_STATUSES = {408, 409, 425}  # in addition to 429 and everything >= 500


def jitter(attempt: int, base_s: float, cap_s: float) -> float:
    """Seconds to wait before attempt ``attempt + 1``: random, up to ``base_s * 2**(attempt-1)``, at most ``cap_s``.

    Full jitter: requests that failed together are not retried together.
    """
    return random.uniform(0, min(cap_s, base_s * 2.0 ** min(attempt - 1, 30)))


def retry_after(headers: Mapping[str, str], now: datetime | None = None) -> float | None:
    """Seconds to wait, from ``retry-after-ms`` or ``Retry-After`` (a number or a date); None without a valid one."""
    exact = finite(headers.get("retry-after-ms"))
    if exact is not None:
        return max(0.0, exact / 1000)
    text = headers.get("retry-after")
    seconds = finite(text)
    if seconds is not None or text is None:
        return seconds if seconds is None else max(0.0, seconds)
    try:
        at = parsedate_to_datetime(text)
    except ValueError:
        return None
    at = at if at.tzinfo is not None else at.replace(tzinfo=UTC)
    return max(0.0, (at - (now or datetime.now(UTC))).total_seconds())


def finite(text: str | None) -> float | None:
    """A header's value as a finite number; None if it is not one."""
    try:
        value = float(text) if text is not None else None
    except ValueError:
        return None
    return value if value is not None and abs(value) < float("inf") else None  # NaN compares false
