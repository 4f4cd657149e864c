"""When a request may be sent: within the endpoint's limits and the budget, until the batch stops."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from resources.judges.budget import Budget
from resources.judges.call import Estimate, Request, highest_usd
from resources.judges.errors import BudgetExceededError, JudgeStoppedError
from resources.judges.rate_limit import RateLimit
from resources.judges.retry import Fault, RetryPolicy
from textalign_dagster.settings.judge import Judge


class Stopping(Exception):
    """The batch stops: nothing more is sent."""


@dataclass(frozen=True)
class Admission:
    """What is set aside for a request: tokens of the rate limit, and the most it can cost."""

    tokens: int
    usd: float


class Gate:
    """Lets the requests of one batch through. Lives in the batch's event loop.

    ``told`` makes a message for people of a problem.
    """

    def __init__(
        self,
        judge: Judge,
        budget: Budget,
        policy: RetryPolicy,
        past: Estimate,
        told: Callable[[str], str],
    ) -> None:
        self.stopping = asyncio.Event()
        self._judge = judge
        self._budget = budget
        self._policy = policy
        self._past = past
        self._told = told
        self._limit = RateLimit(judge.limits.requests_per_minute, judge.limits.tokens_per_minute)
        self._draw = random.Random()
        self._flying = 0  # requests with money set aside
        self._refusals = 0  # pauses for the rate limit in a row
        self._last_reply = time.monotonic()
        self._settled = asyncio.Event()

    async def admit(self, request: Request) -> Admission:
        """Returns as soon as the request may go; `settle` must follow.

        Raises:
            Stopping: the batch stops.
            BudgetExceededError: it could cost more than is left.
        """
        asked = Admission(
            self._past.tokens_in(request) + (self._judge.decoding.max_tokens or 0),
            highest_usd(request, self._judge),
        )
        wait = self._limit.take(asked.tokens)
        try:
            await self.sleep(wait)
            while (pause := self._limit.paused()) > 0:
                await self.sleep(pause + self._draw.uniform(0, min(1.0, pause / 4)))
            await self._afford(asked.usd)
        except BaseException:
            self._limit.give_back(asked.tokens)
            raise
        return asked

    def settle(self, admitted: Admission, tokens: float, usd: float, lost: bool) -> None:
        """What an admitted request really took; ``lost``: it may have been paid for without a reply."""
        self._limit.correct(admitted.tokens, tokens)
        self._flying -= 1
        self._budget.settle(admitted.usd, usd, admitted.usd if lost else 0.0)
        self._settled.set()
        self._settled = asyncio.Event()

    def heed(self, headers: Mapping[str, str], admitted: Admission) -> None:
        """What the endpoint says of its limits."""
        self._limit.heed(headers, admitted.tokens)

    def replied(self) -> None:
        """A reply came: the endpoint lives."""
        self._last_reply = time.monotonic()

    def succeeded(self) -> None:
        """A call is over and well: refusals count from nought."""
        self._refusals = 0

    async def sleep(self, seconds: float) -> None:
        """Waits, but no longer than until the batch stops.

        Raises:
            Stopping: it does.
        """
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), seconds)
        if self.stopping.is_set():
            raise Stopping

    async def back_off(self, attempts: int, wait: float | None) -> None:
        """Waits before the next of a call's attempts; ``wait``: what the endpoint asked for."""
        own = self._policy.backoff(attempts, self._draw)
        await self.sleep(own if wait is None else wait + min(own, 1.0))

    def pause(self, fault: Fault) -> None:
        """Refused for the rate limit: nobody sends for a while.

        Raises:
            JudgeStoppedError: that has gone on for too long.
        """
        silent = time.monotonic() - self._last_reply
        if self._limit.paused() == 0:
            self._refusals += 1
        wait = fault.wait
        if wait is None:
            wait = self._policy.backoff(self._refusals, self._draw)
        if silent + wait > self._policy.patience_s:
            raise JudgeStoppedError(
                self._told(
                    f"{fault.message}: no reply for {silent:.0f} s, and another {wait:.0f} s to wait; run it "
                    "again later, or lower limits.requests_per_minute and limits.concurrency"
                )
            )
        self._limit.pause(wait)

    async def _afford(self, usd: float) -> None:
        """Set a request's highest cost aside; wait for those in flight, which may turn out cheaper."""
        while not self._budget.reserve(usd):
            if not self._flying:
                budget = self._budget
                unsure = f" and up to ${budget.uncertain:.4f} for lost replies" if budget.uncertain else ""
                raise BudgetExceededError(
                    self._told(
                        f"the budget of ${budget.limit:g} does not cover another call (up to ${usd:.6f}), "
                        f"${budget.spent:.4f} being spent{unsure}: raise budget_usd, or ask for less"
                    )
                )
            await self._settled.wait()
            await self.sleep(0)
        self._flying += 1
