"""The calls of one batch: a window of concurrent calls, each with its attempts, limits and money."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx2
import openai

from resources.api_key import ApiKey, ApiKeyError
from resources.budget import Budget
from resources.judge_call import Completion, Estimate, Reply, Request, highest_usd, read_completion, reply_of
from resources.ledger import CallRecord, Ledger
from resources.rate_limit import RateLimit
from resources.retry import Fault, RetryPolicy, classify
from textalign_dagster.judge_settings import Judge

NOTHING = Completion(None, None, None, None, None, None, None)


class JudgeError(Exception):
    """A batch of calls did not finish. All replies so far are in the ledger: run again to resume."""


class JudgeStoppedError(JudgeError):
    """No further call can succeed before what the message names has been mended."""


class BudgetExceededError(JudgeError):
    """The next call could exceed the budget; it was not made."""


@dataclass
class Tally:
    """A batch so far: calls, requests (attempts) and USD of this run.

    ``lost`` counts replies that may have been paid for and were not received, in earlier runs too.
    """

    total: int = 0
    cached: int = 0
    received: int = 0
    failed: int = 0
    lost: int = 0
    requests: int = 0
    usd: float = 0.0

    @property
    def done(self) -> int:
        """Calls with an outcome."""
        return self.cached + self.received + self.failed

    def note(self, seconds: float) -> str:
        """For people: what it cost so far and, after so many seconds, how long it will take."""
        parts = [f"${self.usd:.4f}"] if self.usd else []
        if self.cached:
            parts.append(f"{self.cached:,} from the ledger")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        if self.lost:
            parts.append(f"{self.lost:,} replies lost, possibly paid")
        called = self.received + self.failed
        if called and self.done < self.total:
            parts.append(f"about {seconds / called * (self.total - self.done):.0f} s left")
        return ", ".join(parts)


@dataclass
class Course:
    """A call under way."""

    request: Request
    sent: int = 0  # attempts
    refused: int = 0  # of these, for the rate limit
    lost: int = 0  # of these, possibly paid for without a reply
    called_at: datetime | None = None  # the first attempt
    seconds: float | None = None  # the last attempt
    usd: float | None = None
    fault: Fault | None = None
    completion: Completion | None = None
    recorded: bool = field(default=False)


class _Stopping(Exception):
    """The batch stops: nothing more is sent."""


class Engine:
    """Runs a batch in an event loop; only `cancel` may be called from elsewhere."""

    def __init__(
        self,
        judge: Judge,
        ledger: Ledger,
        budget: Budget,
        policy: RetryPolicy,
        past: Estimate,
        batch_id: str,
        tally: Tally,
    ) -> None:
        try:
            self._key = ApiKey(judge)
        except ApiKeyError as error:
            raise JudgeStoppedError(str(error)) from None
        self._headers = self._key.headers(judge)
        self._params = judge.decoding.params()
        self.judge = judge
        self.ledger = ledger
        self.budget = budget
        self.policy = policy
        self.past = past
        self.batch_id = batch_id
        self.tally = tally
        self.replies: dict[str, Reply] = {}
        self._limit = RateLimit(judge.limits.requests_per_minute, judge.limits.tokens_per_minute)
        self._draw = random.Random()
        self._plain = False  # the endpoint has refused response formats
        self._flying = 0  # requests with money set aside
        self._failures = 0  # calls given up in a row
        self._refusals = 0  # pauses for the rate limit in a row
        self._last_reply = time.monotonic()
        self._error: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = asyncio.Event()
        self._at_once = asyncio.Event()
        self._settled = asyncio.Event()

    def cancel(self, at_once: bool = False) -> None:
        """Send nothing more; wait for the replies in flight for ``grace_s``, or not at all."""
        loop = self._loop
        if loop is None:
            self._stopping.set()
            return
        with contextlib.suppress(RuntimeError):  # it is over
            loop.call_soon_threadsafe(self._stopping.set)
            if at_once:
                loop.call_soon_threadsafe(self._at_once.set)

    async def run(self, missing: Sequence[Request]) -> None:
        """Make the calls; what came of them is in ``replies`` and, on the disk, in the ledger.

        Raises:
            JudgeError: what stopped it, once the calls in flight had their chance to end.
            ArtifactError: the ledger cannot be saved.
        """
        self._loop = asyncio.get_running_loop()
        queue = iter(missing)
        slots = min(self.judge.limits.concurrency, len(missing))
        try:
            async with self._key.client(self.judge, slots) as client:
                tasks = [asyncio.create_task(self._slot(queue, client)) for _ in range(slots)]
                ending = asyncio.create_task(self._end(tasks))
                await asyncio.gather(*tasks, return_exceptions=True)
                ending.cancel()
        finally:
            await asyncio.to_thread(self.ledger.flush)
        if self._error is not None:
            raise self._error

    async def _end(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """When the batch stops, let the calls in flight end for a moment: they are paid for."""
        await self._stopping.wait()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._at_once.wait(), self.policy.grace_s)
        for task in tasks:
            task.cancel()

    async def _slot(self, queue: Iterator[Request], client: openai.AsyncOpenAI) -> None:
        """One of ``concurrency``: takes the next call as soon as its last one is over."""
        while not self._stopping.is_set() and (request := next(queue, None)) is not None:
            try:
                await self._call(request, client)
            except _Stopping:
                return
            except Exception as error:  # noqa: BLE001  # `run` raises it
                self._error = self._error or error
                self._stopping.set()

    async def _call(self, asked: Request, client: openai.AsyncOpenAI) -> None:
        """One call to its end."""
        course = Course(asked.plain if self._plain and asked.plain is not None else asked)
        try:
            while not await self._attempt(course, client):
                fault = course.fault
                assert fault is not None
                if fault.schema and asked.plain is not None and course.request is not asked.plain:
                    self._plain = True
                    self._record(course, "failed")
                    course = Course(asked.plain)
                elif fault.kind == "stop":
                    raise JudgeStoppedError(self._told(fault.message))
                elif fault.kind == "limited":
                    course.refused += 1
                    self._pause(fault)
                elif fault.kind == "call" or course.sent - course.refused >= self.judge.limits.attempts:
                    self._give_up(asked, course)
                    return
                else:
                    own = self.policy.backoff(course.sent - course.refused, self._draw)
                    await self._sleep(own if fault.wait is None else fault.wait + min(own, 1.0))
            self._failures = self._refusals = 0
            self.replies[asked.key] = reply_of(self._record(course, "ok"), from_ledger=False)
            self.tally.received += 1
        finally:
            if course.sent and not course.recorded:  # stopped between or within attempts
                self._record(course, "failed")

    async def _attempt(self, course: Course, client: openai.AsyncOpenAI) -> bool:
        """One request, as soon as limits and budget admit it: a completion, or else a fault."""
        request = course.request
        highest = highest_usd(request, self.judge)
        tokens = self.past.tokens_in(request) + (self.judge.decoding.max_tokens or 0)
        wait = self._limit.take(tokens)
        try:
            await self._sleep(wait)
            while (pause := self._limit.paused()) > 0:
                await self._sleep(pause + self._draw.uniform(0, min(1.0, pause / 4)))
            await self._afford(highest)
        except BaseException:
            self._limit.give_back(tokens)
            raise
        usd, lost, used = 0.0, True, float(tokens)  # unless something better is known
        try:
            course.sent += 1
            course.fault = None
            course.called_at = course.called_at or datetime.now(UTC)
            self.ledger.add(self._row(course, "sent"))
            self.tally.requests += 1
            started = time.monotonic()
            try:
                async with asyncio.timeout(self.judge.limits.timeout_s):
                    # What `client.chat.completions.create` does, without a third of its time: that goes
                    # into checking the messages against their types.
                    response = await client.post(
                        "/chat/completions",
                        cast_to=httpx2.Response,
                        body=self._body(request),
                        options={"headers": self._headers},
                    )
                course.completion = read_completion(response.content)
            except Exception as error:
                course.fault = classify(error, self.judge.limits.timeout_s)
                if course.fault is None:
                    raise
                lost = course.fault.lost
                used = used if lost else 0.0
                if isinstance(error, openai.APIStatusError):
                    self._limit.heed(error.response.headers, tokens)
                return False
            finally:
                course.seconds = time.monotonic() - started
            lost = False
            self._last_reply = time.monotonic()
            counted = (course.completion.tokens_in or 0) + (course.completion.tokens_out or 0)
            used = float(counted or tokens)
            if self.judge.prices is not None:
                usd = course.usd = self._price(course.completion, highest)
            self.tally.usd += usd
            self._limit.heed(response.headers, tokens)
            return True
        finally:
            if lost:
                course.lost += 1
                self.tally.lost += 1
            self._limit.correct(tokens, used)
            self._flying -= 1
            self.budget.settle(highest, usd, highest if lost else 0.0)
            self._settled.set()
            self._settled = asyncio.Event()

    def _body(self, request: Request) -> dict[str, Any]:
        body = {"model": self.judge.model, "messages": list(request.call.messages), **self._params}
        if request.response_format is not None:
            body["response_format"] = request.response_format
        return body

    async def _sleep(self, seconds: float) -> None:
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), seconds)
        if self._stopping.is_set():
            raise _Stopping

    async def _afford(self, usd: float) -> None:
        """Set a request's highest cost aside; wait for those in flight, which may turn out cheaper."""
        while not self.budget.reserve(usd):
            if not self._flying:
                budget = self.budget
                unsure = f" and up to ${budget.uncertain:.4f} for lost replies" if budget.uncertain else ""
                raise BudgetExceededError(
                    self._told(
                        f"the budget of ${budget.limit:g} does not cover another call (up to ${usd:.6f}), "
                        f"${budget.spent:.4f} being spent{unsure}: raise budget_usd, or ask for less"
                    )
                )
            await self._settled.wait()
            await self._sleep(0)
        self._flying += 1

    def _pause(self, fault: Fault) -> None:
        """Refused for the rate limit: nobody sends for a while."""
        silent = time.monotonic() - self._last_reply
        if self._limit.paused() == 0:
            self._refusals += 1
        wait = fault.wait
        if wait is None:
            wait = self.policy.backoff(self._refusals, self._draw)
        if silent + wait > self.policy.patience_s:
            raise JudgeStoppedError(
                self._told(
                    f"{fault.message}: no reply for {silent:.0f} s, and another {wait:.0f} s to wait; run it "
                    "again later, or lower limits.requests_per_minute and limits.concurrency"
                )
            )
        self._limit.pause(wait)

    def _give_up(self, asked: Request, course: Course) -> None:
        self.replies[asked.key] = reply_of(self._record(course, "failed"), from_ledger=False)
        self.tally.failed += 1
        assert course.fault is not None
        self._failures = 0 if course.fault.kind == "call" else self._failures + 1
        if self._failures >= self.policy.outage_calls:
            raise JudgeStoppedError(
                self._told(
                    f"{self._failures} calls in a row failed, {self.judge.limits.attempts} attempts each, the "
                    f"last one with: {course.fault.message}; the endpoint seems to be down, run it again later"
                )
            )

    def _record(self, course: Course, status: str) -> CallRecord:
        record = self._row(course, status)
        course.recorded = True
        self.ledger.add(record)
        return record

    def _row(self, course: Course, status: str) -> CallRecord:
        request, received = course.request, status == "ok"
        got = course.completion if course.completion is not None and received else NOTHING
        error = None
        if status == "failed":
            error = course.fault.message if course.fault is not None else "stopped while in flight"
        assert course.called_at is not None
        return CallRecord(
            call_key=request.key,
            judge=self.judge.model,
            endpoint=self.judge.endpoint,
            messages_hash=request.messages_hash,
            params=request.params,
            repeat=request.call.repeat,
            order_shown=request.call.order_shown,
            raw_reply=self._hide(got.text),
            refusal=self._hide(got.refusal),
            finish_reason=self._hide(got.finish_reason),
            status=status,
            error=self._hide(error),
            attempts=course.sent,
            lost_replies=course.lost,
            chars_in=request.chars,
            tokens_in=got.tokens_in,
            tokens_cached=got.tokens_cached,
            tokens_out=got.tokens_out,
            usd=course.usd if received else None,
            latency_s=None if course.seconds is None else round(course.seconds, 4),
            called_at=course.called_at,
            fingerprint=self._hide(got.fingerprint),
            batch_id=self.batch_id,
            purpose=request.call.purpose,
        )

    def _price(self, got: Completion, highest: float) -> float:
        """USD of a reply; the highest it can be where the endpoint counts no tokens."""
        assert self.judge.prices is not None
        if got.tokens_in is None or got.tokens_out is None:
            return highest
        return self.judge.prices.usd(
            got.tokens_in, got.tokens_out, min(got.tokens_cached or 0, got.tokens_in)
        )

    def _hide(self, text: str | None) -> str | None:
        return None if text is None else self._key.hide(text)

    def _told(self, problem: str) -> str:
        tally = self.tally
        return self._key.hide(
            f"judge {self.judge.model} at {self.judge.endpoint}: {problem} ({tally.done:,} of {tally.total:,} "
            "calls are done; what was received is in the ledger, and is not asked for again)"
        )
