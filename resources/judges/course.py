"""A call under way, and what the ledger is told of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime

from resources.judges.api_key import ApiKey
from resources.judges.call import Completion, Request
from resources.judges.ledger import Ledger
from resources.judges.ledger_records import CallRecord
from resources.judges.retry import Fault
from textalign_dagster.settings.judge import Judge

NOTHING = Completion(None, None, None, None, None, None, None)


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


class Recorder:
    """Writes calls down: a row before the request, and one when it is over. The key is in none."""

    def __init__(self, judge: Judge, ledger: Ledger, key: ApiKey, batch_id: str) -> None:
        self._judge = judge
        self._ledger = ledger
        self._key = key
        self._batch_id = batch_id

    def sent(self, course: Course) -> None:
        """The course's request goes out now."""
        self._ledger.add(self._row(course, "sent"))

    def over(self, course: Course, status: str) -> CallRecord:
        """The course has ended: "ok" or "failed"."""
        record = self._row(course, status)
        course.recorded = True
        self._ledger.add(record)
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
            judge=self._judge.model,
            endpoint=self._judge.endpoint,
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
            batch_id=self._batch_id,
            purpose=request.call.purpose,
        )

    def _hide(self, text: str | None) -> str | None:
        return None if text is None else self._key.hide(text)
