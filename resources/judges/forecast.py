"""Estimates of judge calls before they are sent: tokens, money, time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from resources.judges.call import Call, Request, prepare
from resources.judges.ledger import History, Ledger
from textalign_dagster.settings.judge import Judge

CHARS_PER_TOKEN = 4.0  # English with current vocabularies; replaced by the judge's own past usage
CALIBRATE_FROM = 20  # replies; fewer are not enough to calibrate on


@dataclass(frozen=True)
class Estimate:
    """Tokens per call, from the judge's past usage where there is enough of it."""

    tokens_per_char: float = 1 / CHARS_PER_TOKEN
    tokens_out: float | None = None  # mean per reply
    cached_share: float = 0.0  # share of input tokens served from the endpoint's cache
    seconds: float | None = None  # mean per call
    calls: int = 0  # past calls that this is based on

    @classmethod
    def of(cls, past: History) -> Estimate:
        """From the sums over a judge's past calls."""
        if past.calls < CALIBRATE_FROM or not past.chars_in or not past.tokens_in:
            return cls()
        return cls(
            past.tokens_in / past.chars_in,
            past.tokens_out / past.calls,
            past.tokens_cached / past.tokens_in,
            past.seconds / past.calls,
            past.calls,
        )

    def tokens_in(self, request: Request) -> int:
        """Expected input tokens."""
        return min(request.most_tokens_in, math.ceil(request.chars * self.tokens_per_char))


def estimate(ledger: Ledger, judge: Judge, params: str) -> Estimate:
    """From the judge's past calls with these parameters, else from all its past calls, else 4 characters per token."""
    same = Estimate.of(ledger.history(judge.model, judge.endpoint, params))
    return same if same.calls else Estimate.of(ledger.history(judge.model, judge.endpoint))


def highest_usd(request: Request, judge: Judge) -> float:
    """The highest possible cost of one attempt; 0 without prices."""
    if judge.prices is None:
        return 0.0
    highest_price = max(judge.prices.input, judge.prices.cached_input or 0.0)
    tokens_out = judge.decoding.max_tokens or 0
    return (request.most_tokens_in * highest_price + tokens_out * judge.prices.output) / 1e6


@dataclass(frozen=True)
class Forecast:
    """For the calls that have no outcome in the ledger; ``usd_*`` are None without prices.

    ``failed`` calls were given up by an earlier run; only ``--retry-failed`` sends them again.
    ``tokens_in`` is an estimate: characters per token come from ``calibrated_on`` past replies of this
    judge, else 4 is assumed. ``*_max`` are upper bounds (bytes, max_tokens; one attempt per call), None
    without max_tokens. ``*_expected`` follow past replies, None where there are too few. ``seconds``
    follows from limits, concurrency and past latency, None where nothing is known.
    """

    calls: int
    cached: int
    failed: int
    tokens_in: int
    tokens_in_max: int
    tokens_out_max: int | None
    tokens_out_expected: int | None
    usd_max: float | None
    usd_expected: float | None
    seconds: float | None
    calibrated_on: int


def forecast(calls: Sequence[Call], judge: Judge, ledger: Ledger) -> Forecast:
    """The forecast; sends nothing and needs no key."""
    unique = {request.key: request for request in (prepare(call, judge) for call in calls)}
    found = ledger.outcomes([key for request in unique.values() for key in request.known_as])
    known = [[found[key].status for key in r.known_as if key in found] for r in unique.values()]
    missing = [request for request, statuses in zip(unique.values(), known, strict=True) if not statuses]
    cached = sum("ok" in statuses for statuses in known)
    past = estimate(ledger, judge, missing[0].params if missing else "")
    n, max_tokens = len(missing), judge.decoding.max_tokens
    tokens_in = sum(past.tokens_in(request) for request in missing)
    out_expected = None if past.tokens_out is None else round(past.tokens_out * n)
    usd_max = usd_expected = None
    if judge.prices is not None:
        if max_tokens is not None:
            usd_max = sum(highest_usd(request, judge) for request in missing)
        if out_expected is not None:
            usd_expected = judge.prices.usd(tokens_in, out_expected, tokens_in * past.cached_share)
    limits = judge.limits
    times = []
    if limits.requests_per_minute is not None:
        times.append(n / limits.requests_per_minute * 60)
    if limits.tokens_per_minute is not None and (out_expected is not None or max_tokens is not None):
        tokens_out = out_expected if out_expected is not None else n * (max_tokens or 0)
        times.append((tokens_in + tokens_out) / limits.tokens_per_minute * 60)
    if past.seconds is not None:
        times.append(n / limits.concurrency * past.seconds)
    return Forecast(
        calls=n,
        cached=cached,
        failed=len(unique) - n - cached,
        tokens_in=tokens_in,
        tokens_in_max=sum(request.most_tokens_in for request in missing),
        tokens_out_max=None if max_tokens is None else n * max_tokens,
        tokens_out_expected=out_expected,
        usd_max=usd_max,
        usd_expected=usd_expected,
        seconds=max(times) if times else None,
        calibrated_on=past.calls,
    )
