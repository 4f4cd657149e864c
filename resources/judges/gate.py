"""When a request may be sent: within the endpoint's limits and the budget, until the batch stops."""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from resources.judges.call import Request
from resources.judges.errors import BudgetExceededError
from resources.judges.forecast import Estimate, highest_usd
from resources.judges.rate_limit import RateLimit
from resources.judges.retry import Fault, RetryPolicy
from textalign_dagster.settings.judge import Judge

ROUNDING_USD = 1e-9  # sums of floats


class Budget:
    """A spending limit for calls, including the highest possible cost of those in flight.

    ``spent`` is known cost, ``uncertain`` the highest cost of calls whose reply was lost. ``limit`` in USD;
    None: no limit, costs are only summed. Thread-safe.
    """

    def __init__(self, limit: float | None = None, spent: float = 0.0, uncertain: float = 0.0) -> None:
        self.limit = limit
        self.spent = spent
        self.uncertain = uncertain
        self.reserved = 0.0
        self._lock = threading.Lock()

    def reserve(self, usd: float) -> bool:
        """Reserve a call's highest cost; False if that could exceed the limit."""
        with self._lock:
            committed = self.spent + self.uncertain + self.reserved
            if self.limit is not None and committed + usd > self.limit + ROUNDING_USD:
                return False
            self.reserved += usd
            return True

    def settle(self, reserved: float, spent: float = 0.0, uncertain: float = 0.0) -> None:
        """Replace a reservation by the actual cost of the call."""
        with self._lock:
            self.reserved -= reserved
            self.spent += spent
            self.uncertain += uncertain


class Stopping(Exception):
    """The batch stops: nothing more is sent."""


@dataclass(frozen=True)
class Admission:
    """The reservation for a request: tokens of the rate limit, and its highest cost."""

    tokens: int
    usd: float


class Gate:
    """Admits the requests of one batch. Lives in the batch's event loop.

    ``explained`` turns a problem into a message for the user.
    """

    def __init__(
        self,
        judge: Judge,
        budget: Budget,
        policy: RetryPolicy,
        past: Estimate,
        explained: Callable[[str], str],
    ) -> None:
        self.stopping = asyncio.Event()
        self._judge = judge
        self._budget = budget
        self._policy = policy
        self._past = past
        self._explained = explained
        self._limit = RateLimit(judge.limits.requests_per_minute, judge.limits.tokens_per_minute)
        self._in_flight = 0  # requests with money reserved
        self._refusals = 0  # pauses for the rate limit in a row
        self._last_reply = time.monotonic()
        self._settled = asyncio.Event()

    async def admit(self, request: Request) -> Admission:
        """Returns as soon as the request may be sent; `settle` must follow.

        Raises:
            Stopping: the batch stops.
            BudgetExceededError: it could cost more than is left.
        """
        admission = Admission(
            self._past.tokens_in(request) + (self._judge.decoding.max_tokens or 0),
            highest_usd(request, self._judge),
        )
        wait = self._limit.take(admission.tokens)
        try:
            await self.sleep(wait)
            while (pause := self._limit.paused()) > 0:
                await self.sleep(pause + random.uniform(0, min(1.0, pause / 4)))
            await self._afford(admission.usd)
        except BaseException:
            self._limit.give_back(admission.tokens)
            raise
        return admission

    def settle(self, admitted: Admission, tokens: float, usd: float, lost: bool) -> None:
        """Actual usage of an admitted request; ``lost``: it may have been paid for without a reply."""
        self._limit.correct(admitted.tokens, tokens)
        self._in_flight -= 1
        self._budget.settle(admitted.usd, usd, admitted.usd if lost else 0.0)
        self._settled.set()
        self._settled = asyncio.Event()

    def heed(self, headers: Mapping[str, str], admitted: Admission) -> None:
        """Apply the rate-limit headers of a response."""
        self._limit.heed(headers, admitted.tokens)

    def replied(self) -> None:
        """A reply was received."""
        self._last_reply = time.monotonic()
        self._refusals = 0

    async def sleep(self, seconds: float) -> None:
        """Waits, at most until the batch stops.

        Raises:
            Stopping: the batch stops.
        """
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), seconds)
        if self.stopping.is_set():
            raise Stopping

    async def back_off(self, attempts: int, wait: float | None) -> None:
        """Waits before the next of a call's attempts; ``wait``: as the endpoint requested."""
        own = self._policy.backoff(attempts)
        await self.sleep(own if wait is None else wait + min(own, 1.0))

    def pause(self, fault: Fault) -> str | None:
        """Pauses all requests after a rate-limit refusal; an error message if this has lasted too long, else None."""
        silent = time.monotonic() - self._last_reply
        if self._limit.paused() == 0:
            self._refusals += 1
        wait = fault.wait
        if wait is None:
            wait = self._policy.backoff(self._refusals)
        if silent + wait > self._policy.patience_s:
            return (
                f"{fault.message}: no reply for {silent:.0f} s, and another {wait:.0f} s to wait; run again "
                "later, or lower limits.requests_per_minute and limits.concurrency"
            )
        self._limit.pause(wait)
        return None

    async def _afford(self, usd: float) -> None:
        """Reserve a request's highest cost; waits for requests in flight, which may turn out cheaper."""
        while not self._budget.reserve(usd):
            if not self._in_flight:
                budget = self._budget
                unsure = f" and up to ${budget.uncertain:.4f} for lost replies" if budget.uncertain else ""
                raise BudgetExceededError(
                    self._explained(
                        f"the budget of ${budget.limit:g} does not cover another call (up to ${usd:.6f}); "
                        f"${budget.spent:.4f} is spent{unsure}: raise budget_usd, or judge fewer samples"
                    )
                )
            await self._settled.wait()
            await self.sleep(0)
        self._in_flight += 1
