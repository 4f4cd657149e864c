"""What a batch of judge calls will take, before it is made: calls, tokens, money, time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from resources.judges.call import Call, estimate, highest_usd, prepare
from resources.judges.ledger import Ledger
from textalign_dagster.settings.judge import Judge


@dataclass(frozen=True)
class Forecast:
    """Of the calls that are not in the ledger yet; ``usd`` is None without prices.

    ``tokens_in`` is an estimate: ``calibrated_on`` past replies of this judge say how many tokens a
    character makes, or else 4 characters are taken for one. ``*_max`` are bounds (bytes, max_tokens;
    each call made once), None where there is no max_tokens. ``*_expected`` follow the past replies,
    None where there are too few. ``seconds`` is what limits, concurrency and past latency allow, None
    where nothing is known.
    """

    calls: int
    cached: int
    tokens_in: int
    tokens_in_max: int
    tokens_out_max: int | None
    tokens_out_expected: int | None
    usd_max: float | None
    usd_expected: float | None
    seconds: float | None
    calibrated_on: int


def forecast(calls: Sequence[Call], judge: Judge, ledger: Ledger) -> Forecast:
    """The forecast; calls nobody and needs no key."""
    unique = {request.key: request for request in (prepare(call, judge) for call in calls)}
    found = ledger.find([key for request in unique.values() for key in request.known_as])
    missing = [request for request in unique.values() if not any(key in found for key in request.known_as)]
    past = estimate(ledger, judge, missing[0].params if missing else "")
    n, longest = len(missing), judge.decoding.max_tokens
    tokens_in = sum(past.tokens_in(request) for request in missing)
    out_expected = None if past.tokens_out is None else round(past.tokens_out * n)
    usd_max = usd_expected = None
    if judge.prices is not None:
        if longest is not None:
            usd_max = sum(highest_usd(request, judge) for request in missing)
        if out_expected is not None:
            usd_expected = judge.prices.usd(tokens_in, out_expected, tokens_in * past.cached_share)
    limits = judge.limits
    times = []
    if limits.requests_per_minute is not None:
        times.append(n / limits.requests_per_minute * 60)
    if limits.tokens_per_minute is not None and (out_expected is not None or longest is not None):
        tokens_out = out_expected if out_expected is not None else n * (longest or 0)
        times.append((tokens_in + tokens_out) / limits.tokens_per_minute * 60)
    if past.seconds is not None:
        times.append(n / limits.concurrency * past.seconds)
    return Forecast(
        calls=n,
        cached=len(unique) - n,
        tokens_in=tokens_in,
        tokens_in_max=sum(request.most_tokens_in for request in missing),
        tokens_out_max=None if longest is None else n * longest,
        tokens_out_expected=out_expected,
        usd_max=usd_max,
        usd_expected=usd_expected,
        seconds=max(times) if times else None,
        calibrated_on=past.calls,
    )
