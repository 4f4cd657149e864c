"""One call of a judge: what identifies it, what it may cost, and the reply taken apart."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from resources.judges.ledger import History, Ledger
from resources.judges.ledger_records import CallRecord
from textalign_dagster.ids import canonical_json, content_hash
from textalign_dagster.settings.judge import Judge

CHARS_PER_TOKEN = 4.0  # English with current vocabularies; replaced by the judge's own past usage
TOKENS_PER_MESSAGE = 8  # role and separators, at most, in the chat formats in use
CALIBRATE_FROM = 20  # replies: below, the past says too little

Message = Mapping[str, str]


@dataclass(frozen=True)
class Call:
    """A question to a judge.

    ``messages`` are rendered chat messages (role, content). ``repeat`` tells repetitions of one
    question apart. ``order_shown`` and ``purpose`` are written down with the reply and are no part
    of its key: who asks the same again gets the same reply.
    """

    messages: Sequence[Message]
    repeat: int = 0
    response_format: Mapping[str, Any] | None = None
    order_shown: str | None = None
    purpose: str = ""


@dataclass(frozen=True)
class Reply:
    """What came of a call. ``status`` is "ok" (a reply was received) or "failed" (see ``error``).

    ``text`` is the raw reply: None when the judge refused or said nothing. ``from_ledger``: nobody
    was called. Costs are those of the call, whenever it was made; tokens are None where the endpoint
    did not count them, ``usd`` where the judge has no prices.
    """

    call_key: str
    status: str
    text: str | None
    refusal: str | None
    finish_reason: str | None
    error: str | None
    attempts: int
    tokens_in: int | None
    tokens_cached: int | None
    tokens_out: int | None
    usd: float | None
    latency_s: float | None
    from_ledger: bool


@dataclass(frozen=True)
class Request:
    """A call as it is sent, with its key; ``plain``: the same without a response format."""

    key: str
    call: Call
    response_format: Mapping[str, Any] | None
    messages_hash: str
    params: str
    chars: int
    most_tokens_in: int
    plain: Request | None = field(default=None, repr=False)

    @property
    def known_as(self) -> tuple[str, ...]:
        """The keys under which a reply to it may be found, the best first."""
        return (self.key,) if self.plain is None else (self.key, self.plain.key)


class BrokenReplyError(Exception):
    """An answer that is no chat completion: cut off, or something else altogether."""


class Completion(NamedTuple):
    """The parts of a chat completion that are kept."""

    text: str | None
    refusal: str | None
    finish_reason: str | None
    tokens_in: int | None
    tokens_cached: int | None
    tokens_out: int | None
    fingerprint: str | None


def prepare(call: Call, judge: Judge) -> Request:
    """The request that a call becomes.

    Its key is ``content_hash(model, endpoint, params, messages, response_format, repeat)``.
    """
    wanted = call.response_format if judge.structured != "off" else None
    plain = _request(call, judge, None) if wanted is not None and judge.structured == "auto" else None
    return _request(call, judge, wanted, plain)


def _request(
    call: Call, judge: Judge, response_format: Mapping[str, Any] | None, plain: Request | None = None
) -> Request:
    params = judge.decoding.params()
    messages = [dict(message) for message in call.messages]
    if not messages:
        raise ValueError("a call to a judge has no messages")
    key = content_hash(
        "feedback_call", judge.model, judge.endpoint, params, messages, response_format, call.repeat
    )
    texts = [*(message["content"] for message in messages)]
    if response_format is not None:
        texts.append(canonical_json(response_format))
    recorded = params if response_format is None else {**params, "response_format": response_format}
    return Request(
        key=key,
        call=call,
        response_format=response_format,
        messages_hash=content_hash(messages),
        params=canonical_json(recorded),
        chars=sum(map(len, texts)),
        # A token of a byte-level vocabulary is at least one byte: never more than this.
        most_tokens_in=sum(len(text.encode()) for text in texts) + TOKENS_PER_MESSAGE * (len(messages) + 1),
        plain=plain,
    )


@dataclass(frozen=True)
class Estimate:
    """Tokens of calls before they are made, from the judge's past usage where there is enough."""

    tokens_per_char: float = 1 / CHARS_PER_TOKEN
    tokens_out: float | None = None  # of a reply, on average
    cached_share: float = 0.0  # of input tokens, answered from the endpoint's cache
    seconds: float | None = None  # of a call, on average
    calls: int = 0  # that this rests on

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
        """Input tokens to be expected."""
        return min(request.most_tokens_in, math.ceil(request.chars * self.tokens_per_char))


def estimate(ledger: Ledger, judge: Judge, params: str) -> Estimate:
    """From the judge's past calls with these parameters, else from all its past calls, else the rule
    of thumb."""
    same = Estimate.of(ledger.history(judge.model, judge.endpoint, params))
    return same if same.calls else Estimate.of(ledger.history(judge.model, judge.endpoint))


def highest_usd(request: Request, judge: Judge) -> float:
    """The most that one attempt can cost; 0 without prices."""
    if judge.prices is None:
        return 0.0
    dearest = max(judge.prices.input, judge.prices.cached_input or 0.0)
    tokens_out = judge.decoding.max_tokens or 0
    return (request.most_tokens_in * dearest + tokens_out * judge.prices.output) / 1e6


def reply_of(record: CallRecord, *, from_ledger: bool) -> Reply:
    """The row as its caller sees it."""
    return Reply(
        call_key=record.call_key,
        status=record.status,
        text=record.raw_reply,
        refusal=record.refusal,
        finish_reason=record.finish_reason,
        error=record.error,
        attempts=record.attempts,
        tokens_in=record.tokens_in,
        tokens_cached=record.tokens_cached,
        tokens_out=record.tokens_out,
        usd=record.usd,
        latency_s=record.latency_s,
        from_ledger=from_ledger,
    )


def read_completion(body: bytes) -> Completion:
    """Take an endpoint's answer apart.

    Raises:
        BrokenReplyError: no JSON (cut off), or no chat completion.
    """
    try:
        content = json.loads(body)
    except ValueError:
        raise BrokenReplyError(f"the reply is cut off or no JSON ({len(body)} bytes)") from None
    try:
        choice = content["choices"][0]
        message = choice["message"]
        text, refusal = _text(message.get("content")), message.get("refusal")
        finish_reason = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise BrokenReplyError(f"the reply is no chat completion: {_problem(content)}") from None
    usage = content.get("usage")
    usage = usage if isinstance(usage, dict) else {}
    details = usage.get("prompt_tokens_details")
    cached = details.get("cached_tokens") if isinstance(details, dict) else None
    return Completion(
        text,
        str(refusal) if refusal else None,
        str(finish_reason) if finish_reason else None,
        _count(usage.get("prompt_tokens")),
        _count(cached),
        _count(usage.get("completion_tokens")),
        str(content["system_fingerprint"]) if content.get("system_fingerprint") else None,
    )


def _text(content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")  # a list of parts


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and value >= 0 and not isinstance(value, bool) else None


def _problem(content: Any) -> str:
    error = content.get("error") if isinstance(content, dict) else None
    said = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(said or content).split())[:300]
