"""One call in progress: sends its requests, and writes each to the ledger before and after."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx2
import openai

from resources.judges.api_key import ApiKey
from resources.judges.call import Completion, Request, Tally, read_completion
from resources.judges.gate import Gate
from resources.judges.ledger import Ledger
from resources.judges.ledger_records import INTERRUPTED, CallRecord
from resources.judges.retry import Fault, classify
from textalign_dagster.settings.judge import Judge

PROBE = "probe"  # the purpose of a call that tests the endpoint


@dataclass
class Attempts:
    """A call in progress. ``asked`` is the caller's request, ``request`` the one sent for it."""

    asked: Request
    request: Request
    probe: bool = False
    sent: int = 0  # attempts
    refused: int = 0  # of these, by the rate limit
    lost: int = 0  # of these, possibly paid for without a reply
    called_at: datetime | None = None  # first attempt
    started: float = 0.0  # last attempt; monotonic, as is the next
    failed_at: float | None = None  # when it was set aside
    seconds: float | None = None  # last attempt
    usd: float | None = None
    fault: Fault | None = None
    completion: Completion | None = None
    recorded: bool = False


class Sender:
    """Sends the requests of a batch, one attempt at a time."""

    def __init__(
        self, judge: Judge, ledger: Ledger, key: ApiKey, gate: Gate, tally: Tally, batch_id: str
    ) -> None:
        self._judge = judge
        self._ledger = ledger
        self._key = key
        self._gate = gate
        self._tally = tally
        self._batch_id = batch_id
        self._headers = key.headers(judge)

    async def attempt(self, call: Attempts, client: openai.AsyncOpenAI) -> bool:
        """Send one request as soon as limits and budget allow. True: a completion; False: a fault."""
        admitted = await self._gate.admit(call.request)
        usd, lost, used = 0.0, True, float(admitted.tokens)  # unless something better is known
        try:
            call.sent += 1
            call.fault = None
            call.called_at = call.called_at or datetime.now(UTC)
            self._ledger.add(self._row(call, "sent"))
            self._tally.requests += 1
            call.started = time.monotonic()
            try:
                async with asyncio.timeout(self._judge.limits.timeout_s):
                    # `client.chat.completions.create` would take three times as long: it validates the
                    # messages against their types.
                    response = await client.post(
                        "/chat/completions",
                        cast_to=httpx2.Response,
                        body=call.request.body(self._judge),
                        options={"headers": self._headers},
                    )
                call.completion = read_completion(response.content)
            except Exception as error:
                call.fault = classify(error, self._judge.limits.timeout_s)
                if call.fault is None:
                    raise
                lost = call.fault.lost
                used = used if lost else 0.0
                if isinstance(error, openai.APIStatusError):
                    self._gate.heed(error.response.headers, admitted)
                return False
            finally:
                call.seconds = time.monotonic() - call.started
            lost = False
            self._gate.replied()
            counted = (call.completion.tokens_in or 0) + (call.completion.tokens_out or 0)
            used = float(counted or admitted.tokens)
            if self._judge.prices is not None:
                usd = call.usd = self._price(call.completion, admitted.usd)
            self._tally.usd += usd
            self._gate.heed(response.headers, admitted)
            return True
        finally:
            if lost:
                call.lost += 1
                self._tally.lost += 1
            self._gate.settle(admitted, used, usd, lost)

    def record(self, call: Attempts, status: str) -> CallRecord:
        """Write to the ledger how the call ended: "ok", "failed" or "stopped"."""
        record = self._row(call, status)
        call.recorded = True
        self._ledger.add(record)
        return record

    def _price(self, got: Completion, highest: float) -> float:
        """USD of a reply; the highest possible cost if the endpoint does not report token counts."""
        assert self._judge.prices is not None
        if got.tokens_in is None or got.tokens_out is None:
            return highest
        return self._judge.prices.usd(got.tokens_in, got.tokens_out, got.tokens_cached or 0)

    def _row(self, call: Attempts, status: str) -> CallRecord:
        request, received, hide = call.request, status == "ok", self._key.hide
        got = call.completion if call.completion is not None and received else Completion()
        error = None
        if status in ("failed", "stopped"):
            error = call.fault.message if call.fault is not None else INTERRUPTED
        assert call.called_at is not None
        return CallRecord(
            call_key=request.key,
            judge=self._judge.model,
            endpoint=self._judge.endpoint,
            messages_hash=request.messages_hash,
            params=request.params,
            repeat=request.call.repeat,
            order_shown=request.call.order_shown,
            raw_reply=hide(got.text),
            refusal=hide(got.refusal),
            finish_reason=hide(got.finish_reason),
            status=status,
            error=hide(error),
            attempts=call.sent,
            lost_replies=call.lost,
            chars_in=request.chars,
            tokens_in=got.tokens_in,
            tokens_cached=got.tokens_cached,
            tokens_out=got.tokens_out,
            usd=call.usd if received else None,
            latency_s=None if call.seconds is None else round(call.seconds, 4),
            called_at=call.called_at,
            fingerprint=hide(got.fingerprint),
            batch_id=self._batch_id,
            purpose=PROBE if call.probe else request.call.purpose,
            reply_model=hide(got.model),
        )
