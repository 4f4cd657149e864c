"""The calls of one batch: a window of concurrent calls, and the attempts of each.

Before its last attempt, a call that keeps failing is set aside until it is clear whether the call or the
endpoint is at fault. A reply to a request that was sent later shows that the endpoint is up: the call gets its
last attempt, and is given up (``failed``) if that fails too. If no such reply arrives, a *probe* is sent: a
call that worked before, or else a neutral question. If the probe fails as well, the endpoint is down or refuses
everything, and the batch stops; calls that were set aside are sent again by the next run.

`gate` decides when a request may be sent, `attempt` sends it and writes it to the ledger.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Sequence

import openai

from resources.judges.api_key import ApiKey, ApiKeyError
from resources.judges.attempt import Attempts, Sender
from resources.judges.call import Reply, Request, Tally, neutral, reply_of
from resources.judges.errors import JudgeStoppedError
from resources.judges.forecast import Estimate
from resources.judges.gate import Budget, Gate, Stopping
from resources.judges.ledger import Ledger
from resources.judges.retry import RetryPolicy
from textalign_dagster.settings.judge import Judge


class Engine:
    """Runs a batch in an event loop; only `cancel` may be called from other threads.

    ``worked``: requests that have a reply in the ledger; one of them may serve as a probe.
    """

    def __init__(
        self,
        judge: Judge,
        ledger: Ledger,
        budget: Budget,
        policy: RetryPolicy,
        past: Estimate,
        batch_id: str,
        tally: Tally,
        worked: Sequence[Request] = (),
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
        self._gate = Gate(judge, budget, policy, past, self._explained)
        self._sender = Sender(judge, ledger, self._key, self._gate, tally, batch_id)
        self._plain = False  # the endpoint has refused response formats
        self._queue: deque[Request] = deque()
        self._doubtful: deque[Attempts] = deque()  # set aside, in the order they failed
        self._active = 0  # calls in progress, the probe included
        self._probing = False
        self._suspect_since = 0.0  # when the call that prompted the probe failed
        self._worked = list(worked)
        self._up_at = float("-inf")  # send time of the latest request that got a reply
        self._changed = asyncio.Event()
        self._error: Exception | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stopping = self._gate.stopping
        self._at_once = asyncio.Event()

    def cancel(self, at_once: bool = False) -> None:
        """Send nothing more; wait up to ``grace_s`` for replies in flight, or not at all."""
        loop = self._loop
        if loop is None:
            self._stopping.set()
            return
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(self._stopping.set)
            if at_once:
                loop.call_soon_threadsafe(self._at_once.set)

    async def run(self, missing: Sequence[Request]) -> None:
        """Make the calls; their outcomes are in ``replies`` and, on disk, in the ledger.

        Raises:
            JudgeError: the batch stopped; raised once the calls in flight have had a chance to finish.
            ArtifactError: the ledger cannot be saved.
        """
        self._loop = asyncio.get_running_loop()
        self._queue.extend(missing)
        slots = min(self.judge.limits.concurrency, len(missing))
        try:
            async with self._key.client(self.judge, slots) as client:
                tasks = [asyncio.create_task(self._slot(client)) for _ in range(slots)]
                ending = asyncio.create_task(self._end(tasks))
                await asyncio.gather(*tasks, return_exceptions=True)
                ending.cancel()
            for call in self._doubtful:  # not given up: the next run sends them again
                self._sender.record(call, "stopped")
        finally:
            await asyncio.to_thread(self.ledger.flush)
        if self._error is not None:
            raise self._error

    async def _end(self, tasks: Sequence[asyncio.Task[None]]) -> None:
        """When the batch stops, give the calls in flight a moment to finish: they are paid for."""
        await self._stopping.wait()
        self._notify()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._at_once.wait(), self.policy.grace_s)
        for task in tasks:
            task.cancel()

    async def _slot(self, client: openai.AsyncOpenAI) -> None:
        """One of ``concurrency`` slots: takes the next call as soon as its previous one has ended."""
        while (call := await self._next()) is not None:
            self._active += 1
            try:
                await self._call(call, client)
            except Stopping:
                return
            except Exception as error:  # noqa: BLE001  # `run` raises it
                self._error = self._error or error
                self._stopping.set()
            finally:
                self._active -= 1
                self._notify()

    async def _next(self) -> Attempts | None:
        """What to send next: a call set aside, if the endpoint is up; a probe; or a new call. None: nothing left."""
        while not self._stopping.is_set():
            if self._doubtful and self._is_up_since(self._doubtful[0]):
                return self._doubtful.popleft()
            idle = not self._queue and not self._active
            if self._doubtful and not self._probing and (idle or len(self._doubtful) >= self._patience()):
                return self._probe()
            if self._queue and not self._probing:
                asked = self._queue.popleft()
                plain = asked.plain if self._plain else None
                return Attempts(asked, plain or asked)
            if idle and not self._doubtful:
                return None
            await self._changed.wait()
        return None

    def _notify(self) -> None:
        """Wake the slots that wait in `_next`."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _call(self, call: Attempts, client: openai.AsyncOpenAI) -> None:
        """The attempts of one call, until it succeeds, is given up or is set aside."""
        aside = False
        try:
            if call.failed_at is not None and self._is_final(call):
                self._give_up(call)
                return
            while not await self._sender.attempt(call, client):
                fault = call.fault
                assert fault is not None
                if fault.schema and call.asked.plain is not None and call.request is not call.asked.plain:
                    self._plain = True
                    self._sender.record(call, "stopped")
                    call = Attempts(call.asked, call.asked.plain, call.probe)
                    continue
                problem = None
                if fault.kind == "limited":
                    call.refused += 1
                    problem = self._gate.pause(fault)
                    if problem is None:
                        continue
                tried, attempts = call.sent - call.refused, self.judge.limits.attempts
                before = attempts if call.probe else max(1, attempts - 1)  # then it is set aside
                if fault.kind == "again" and call.failed_at is None and tried < before:
                    await self._gate.back_off(tried, fault.wait)
                elif call.probe:
                    self._probe_failed(call, problem)
                    return
                elif fault.kind == "call" or (call.failed_at is not None and fault.kind != "limited"):
                    self._give_up(call)
                    return
                else:
                    call.failed_at, aside = time.monotonic(), True
                    self._doubtful.append(call)
                    return
            self._succeed(call)
        finally:
            if call.sent and not call.recorded and not aside:  # stopped between or within attempts
                self._sender.record(call, "stopped")
            if call.probe:
                self._probing = False

    def _succeed(self, call: Attempts) -> None:
        self._up_at = max(self._up_at, call.started)
        self._worked = [call.request]
        reply = reply_of(self._sender.record(call, "ok"), from_ledger=False)
        if not call.probe:
            self.replies[call.asked.key] = reply
            self.tally.received += 1
        self._notify()

    def _give_up(self, call: Attempts) -> None:
        self.replies[call.asked.key] = reply_of(self._sender.record(call, "failed"), from_ledger=False)
        self.tally.failed += 1

    def _is_up_since(self, call: Attempts) -> bool:
        """Whether a request that was sent after the call's last attempt got a reply."""
        return call.failed_at is not None and call.failed_at < self._up_at

    def _is_final(self, call: Attempts) -> bool:
        """Whether another attempt would end the same way, now that the endpoint is up."""
        only_one = self.judge.limits.attempts == 1
        return call.fault is not None and (only_one or call.fault.kind in ("refused", "limited"))

    def _patience(self) -> int:
        """How many calls are set aside before a probe is sent."""
        fault = self._doubtful[0].fault
        nothing_worked = self._up_at == float("-inf")
        at_once = fault is not None and (
            fault.kind == "limited" or (fault.kind in ("refused", "stop") and nothing_worked)
        )
        return 1 if at_once else self.policy.outage_calls

    def _probe(self) -> Attempts:
        """A call that worked before; if none has, a neutral question."""
        self._probing, first = True, self._doubtful[0]
        assert first.failed_at is not None
        self._suspect_since = first.failed_at
        if self._worked:
            request = random.choice(self._worked)
        else:
            request = neutral(self.judge, first.request.response_format)
        return Attempts(request, request, probe=True)

    def _probe_failed(self, probe: Attempts, problem: str | None) -> None:
        """Stop the batch, unless another call has shown meanwhile that the endpoint is up.

        Raises:
            JudgeStoppedError: the endpoint is down, or refuses every call.
        """
        fault = probe.fault
        assert fault is not None
        if fault.kind == "call":  # the endpoint is up, but will not answer this call
            self._up_at = max(self._up_at, probe.started)
        if self._up_at > self._suspect_since:
            return
        if problem is None:
            problem = f"{fault.message}; {fault.remedy}"
        if fault.kind == "again":
            failed = f"{len(self._doubtful)} calls in a row failed"
            tested = "a call that worked before" if self._worked else "a test question"
            problem = (
                f"{failed}, and so did {tested}, with: {fault.message}; the endpoint seems to be down; run "
                "again later"
            )
        raise JudgeStoppedError(self._explained(problem))

    def _explained(self, problem: str) -> str:
        tally = self.tally
        return self._key.hide(
            f"judge {self.judge.model} at {self.judge.endpoint}: {problem} ({tally.done:,} of {tally.total:,} "
            "calls are done; replies received so far are in the ledger and will not be paid for again)"
        )
