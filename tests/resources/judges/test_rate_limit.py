"""Token buckets under a fake clock, rate-limit headers, and budgets."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("openai", reason="judges need the extra judges")

from resources.backoff import jitter, retry_after
from resources.judges.gate import Budget
from resources.judges.rate_limit import RateLimit, TokenBucket, duration


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


arrivals = st.lists(
    st.tuples(st.floats(0, 20), st.floats(0, 300)), min_size=1, max_size=60
)  # seconds since the previous arrival, units


def granted(
    bucket: TokenBucket, clock: Clock, arrivals: list[tuple[float, float]]
) -> list[tuple[float, float]]:
    """The (time, units) of every grant; first come, first served."""
    grants = []
    for gap, units in arrivals:
        clock.now += gap
        grants.append((clock.now + bucket.take(units), units))
    assert all(later[0] >= earlier[0] - 1e-6 for earlier, later in itertools.pairwise(grants))
    return grants


@given(st.integers(1, 10_000), arrivals)
def test_grants_of_any_size_respect_the_rate(per_minute: int, arrivals: list[tuple[float, float]]) -> None:
    clock = Clock()
    bucket = TokenBucket(per_minute, clock)
    grants = granted(bucket, clock, arrivals)
    for i, (start, _) in enumerate(grants):
        after = 0.0
        for at, units in grants[i + 1 :]:
            after += units
            assert after <= (bucket.capacity + bucket.rate * (at - start)) * (1 + 1e-6) + 1e-3


@given(st.integers(1, 500), st.lists(st.floats(0, 20), min_size=1, max_size=100))
def test_no_minute_exceeds_its_request_limit(per_minute: int, gaps: list[float]) -> None:
    clock = Clock()
    times = [at for at, _ in granted(TokenBucket(per_minute, clock), clock, [(gap, 1) for gap in gaps])]
    assert all(later - earlier > 60 for earlier, later in zip(times, times[per_minute:], strict=False))


@given(st.integers(60, 10_000), st.integers(1, 500))
def test_a_bucket_wastes_little_capacity(per_minute: int, requests: int) -> None:
    clock = Clock()
    bucket = TokenBucket(per_minute, clock)
    last = max(bucket.take(1) for _ in range(requests))
    assert last <= max(0, requests - bucket.capacity) / per_minute * 60 * (62 / 60) + 1e-6


@given(st.lists(st.floats(0, 1000), max_size=30))
def test_corrections_restore_the_bucket(estimates: list[float]) -> None:
    clock = Clock()
    limit = RateLimit(None, 6000, clock)
    for tokens in estimates:
        limit.take(tokens)
        limit.correct(tokens, 0)
    assert limit.take(limit._tokens.capacity if limit._tokens else 0) == pytest.approx(0, abs=1e-6)
    limit.correct(0, 620)  # more than estimated
    assert limit.take(0) > 5


def test_requests_and_tokens_are_both_limited() -> None:
    clock = Clock()
    limit = RateLimit(600, 6000, clock)
    waits = [limit.take(10) for _ in range(40)]
    assert waits[0] == 0 and waits[-1] == pytest.approx((40 * 10 - 2 * 6000 / 62) * 62 / 6000)
    limit.give_back(10)
    assert limit.take(10) == pytest.approx(waits[-1])
    assert RateLimit(None, None, clock).take(10**9) == 0


def test_pauses_do_not_shorten_each_other() -> None:
    clock = Clock()
    limit = RateLimit(None, None, clock)
    limit.pause(5)
    limit.pause(1)
    clock.now += 2
    assert limit.paused() == pytest.approx(3)
    clock.now += 4
    assert limit.paused() == 0


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ({}, 0),
        ({"x-ratelimit-remaining-requests": "3", "x-ratelimit-reset-requests": "9s"}, 0),
        ({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "9s"}, 9),
        # The reset time is for the whole bucket; one of 90 requests is available after a ninetieth of it.
        (
            {
                "x-ratelimit-remaining-requests": "0",
                "x-ratelimit-reset-requests": "9s",
                "x-ratelimit-limit-requests": "90",
            },
            0.1,
        ),
        ({"x-ratelimit-remaining-tokens": "99", "x-ratelimit-reset-tokens": "20ms"}, 0.02),
        ({"x-ratelimit-remaining-tokens": "0", "x-ratelimit-reset-tokens": "24h"}, 60),
        ({"x-ratelimit-remaining-tokens": "none", "x-ratelimit-reset-tokens": "?"}, 0),
    ],
)
def test_headers(headers: dict[str, str], expected: float) -> None:
    limit = RateLimit(None, None, Clock())
    limit.heed(headers, 100)
    assert limit.paused() == pytest.approx(expected)


def test_durations_and_retry_after() -> None:
    texts = ["6m0s", "20ms", "1h2m3.5s", "1.5", "", "soon", None, "1s?"]
    assert [duration(text) for text in texts] == [360, 0.02, 3723.5, 1.5, None, None, None, None]
    now = datetime(2026, 1, 1, tzinfo=UTC)
    assert retry_after({"retry-after": "2"}) == 2
    assert retry_after({"retry-after-ms": "250", "retry-after": "2"}) == 0.25
    assert retry_after({"retry-after": "Thu, 01 Jan 2026 00:00:07 GMT"}, now) == 7
    assert retry_after({"retry-after": "Thu, 01 Jan 2025 00:00:07 GMT"}, now) == 0
    assert [retry_after(h) for h in ({}, {"retry-after": "later"}, {"retry-after": "nan"})] == [None] * 3


@given(st.integers(1, 10**6))
def test_backoff_is_bounded_and_jittered(attempt: int) -> None:
    waits = [jitter(attempt, 1, 60) for _ in range(20)]
    assert min(waits) >= 0 and max(waits) <= min(60, 2 ** min(attempt - 1, 10)) and len(set(waits)) > 1


@given(
    st.floats(0, 10),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1), st.booleans()), max_size=50),
)
def test_a_budget_is_never_exceeded(limit: float, calls: list[tuple[float, float, bool]]) -> None:
    budget = Budget(limit)
    in_flight: list[tuple[float, float]] = []
    for highest, share, ends in calls:
        if budget.reserve(highest):
            in_flight.append((highest, share))
        if ends and in_flight:
            highest, share = in_flight.pop()
            budget.settle(highest, spent=highest * share)
        assert budget.spent + budget.uncertain + budget.reserved <= limit + 1e-6
