"""The calls of one batch: a window of concurrent calls, and each call's way through its attempts.

`judge_gate` says when a request may be sent, `judge_attempt` sends it, `judge_course` writes it down.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator, Sequence

import openai

from resources.judges.api_key import ApiKey, ApiKeyError
from resources.judges.attempt import Sender
from resources.judges.budget import Budget
from resources.judges.call import Estimate, Reply, Request, reply_of
from resources.judges.course import Course, Recorder
from resources.judges.errors import JudgeStoppedError
from resources.judges.gate import Gate, Stopping
from resources.judges.ledger import Ledger
from resources.judges.retry import RetryPolicy
from resources.judges.tally import Tally
from textalign_dagster.settings.judge import Judge


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
        self.judge = judge
        self.ledger = ledger
        self.policy = policy
        self.tally = tally
        self.replies: dict[str, Reply] = {}
        self._gate = Gate(judge, budget, policy, past, self._told)
        self._recorder = Recorder(judge, ledger, self._key, batch_id)
        self._sender = Sender(judge, self._key, self._gate, self._recorder, tally)
        self._plain = False  # the endpoint has refused response formats
        self._failures = 0  # calls given up in a row
        self._error: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = self._gate.stopping
        self._at_once = asyncio.Event()

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
            except Stopping:
                return
            except Exception as error:  # noqa: BLE001  # `run` raises it
                self._error = self._error or error
                self._stopping.set()

    async def _call(self, asked: Request, client: openai.AsyncOpenAI) -> None:
        """One call to its end."""
        course = Course(asked.plain if self._plain and asked.plain is not None else asked)
        try:
            while not await self._sender.attempt(course, client):
                fault = course.fault
                assert fault is not None
                if fault.schema and asked.plain is not None and course.request is not asked.plain:
                    self._plain = True
                    self._recorder.over(course, "failed")
                    course = Course(asked.plain)
                elif fault.kind == "stop":
                    raise JudgeStoppedError(self._told(fault.message))
                elif fault.kind == "limited":
                    course.refused += 1
                    self._gate.pause(fault)
                elif fault.kind == "call" or course.sent - course.refused >= self.judge.limits.attempts:
                    self._give_up(asked, course)
                    return
                else:
                    await self._gate.back_off(course.sent - course.refused, fault.wait)
            self._failures = 0
            self._gate.succeeded()
            self.replies[asked.key] = reply_of(self._recorder.over(course, "ok"), from_ledger=False)
            self.tally.received += 1
        finally:
            if course.sent and not course.recorded:  # stopped between or within attempts
                self._recorder.over(course, "failed")

    def _give_up(self, asked: Request, course: Course) -> None:
        self.replies[asked.key] = reply_of(self._recorder.over(course, "failed"), from_ledger=False)
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

    def _told(self, problem: str) -> str:
        tally = self.tally
        return self._key.hide(
            f"judge {self.judge.model} at {self.judge.endpoint}: {problem} ({tally.done:,} of {tally.total:,} "
            "calls are done; what was received is in the ledger, and is not asked for again)"
        )
