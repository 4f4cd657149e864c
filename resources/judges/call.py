"""One judge call: its key, the request, the reply, and the progress of many calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from resources.judges.ledger_records import CallRecord
from textalign_dagster.ids import canonical_json, content_hash
from textalign_dagster.settings.judge import Judge

TOKENS_PER_MESSAGE = 8  # role and separators; an upper bound for the chat formats in use

Message = Mapping[str, str]
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Call:
    """A question for a judge.

    ``messages`` are rendered chat messages (role, content). ``repeat`` distinguishes repetitions of one
    question. ``order_shown`` and ``purpose`` are stored with the reply and are not part of the key: the same
    question asked for another purpose gets the same reply.
    """

    messages: Sequence[Message]
    repeat: int = 0
    response_format: Mapping[str, Any] | None = None
    order_shown: str | None = None
    purpose: str = ""


@dataclass(frozen=True)
class Reply:
    """The outcome of a call. ``status`` is "ok" (a reply was received) or "failed" (see ``error``).

    ``text`` is the raw reply, None when the judge refused or returned no text. ``from_ledger``: no request
    was sent. Costs are those of the original call; tokens are None where the endpoint did not report them,
    ``usd`` where the judge has no prices. ``model`` is the model named in the reply.
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
    model: str | None
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
        """The keys under which a reply may be in the ledger, the preferred one first."""
        return (self.key,) if self.plain is None else (self.key, self.plain.key)

    def body(self, judge: Judge) -> dict[str, Any]:
        """The chat completion to ask for, as JSON."""
        messages = [dict(message) for message in self.call.messages]
        body: dict[str, Any] = {"model": judge.model, "messages": messages, **judge.decoding.params()}
        if self.response_format is not None:
            body["response_format"] = self.response_format
        return body


class BrokenReplyError(Exception):
    """A response that is not a chat completion: truncated, or something else altogether."""


class Completion(NamedTuple):
    """The parts of a chat completion that are stored."""

    text: str | None = None
    refusal: str | None = None
    finish_reason: str | None = None
    tokens_in: int | None = None
    tokens_cached: int | None = None
    tokens_out: int | None = None
    fingerprint: str | None = None
    model: str | None = None


@dataclass
class Tally:
    """Progress of one batch of calls: calls, requests (attempts) and USD of this run.

    ``failed`` counts calls that were given up, ``lost`` replies that may have been paid for but were not
    received, both including earlier runs.
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
        """Cost so far and the estimated time left, given the seconds elapsed."""
        parts = [f"${self.usd:.4f}"] if self.usd else []
        if self.cached:
            parts.append(f"{self.cached:,} from the ledger")
        if self.failed:
            parts.append(f"{self.failed:,} failed")
        if self.lost:
            parts.append(f"{self.lost:,} replies lost, possibly paid for")
        if self.received and self.done < self.total:
            parts.append(f"about {seconds / self.received * (self.total - self.done):.0f} s left")
        return ", ".join(parts)


def prepare(call: Call, judge: Judge) -> Request:
    """The request for a call.

    Its key is ``content_hash(model, endpoint, params, messages, response_format, repeat)``.
    """
    response_format = call.response_format if judge.structured != "off" else None
    plain = (
        _request(call, judge, None) if response_format is not None and judge.structured == "auto" else None
    )
    return _request(call, judge, response_format, plain)


def neutral(judge: Judge, response_format: Mapping[str, Any] | None) -> Request:
    """A question that every chat model can answer: tests the endpoint if there is no earlier call to repeat."""
    return _request(Call([{"role": "user", "content": "Reply with the word OK."}]), judge, response_format)


def _request(
    call: Call, judge: Judge, response_format: Mapping[str, Any] | None, plain: Request | None = None
) -> Request:
    params = judge.decoding.params()
    messages = [dict(message) for message in call.messages]
    if not messages:
        raise ValueError("a judge call has no messages")
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
        # A token of a byte-level vocabulary is at least one byte, so this is an upper bound.
        most_tokens_in=sum(len(text.encode()) for text in texts) + TOKENS_PER_MESSAGE * (len(messages) + 1),
        plain=plain,
    )


def reply_of(record: CallRecord, *, from_ledger: bool) -> Reply:
    """The reply in a row of the ledger."""
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
        model=record.reply_model,
        from_ledger=from_ledger,
    )


def read_completion(body: bytes) -> Completion:
    """Parses a response body.

    Raises:
        BrokenReplyError: not JSON (truncated), or not a chat completion.
    """
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise BrokenReplyError(f"the reply is cut off or not JSON ({len(body)} bytes)") from None
    try:
        choice = content["choices"][0]
        message = choice["message"]
        text, refusal = _text(message.get("content")), message.get("refusal")
        finish_reason = choice.get("finish_reason")
    except (KeyError, IndexError, TypeError, AttributeError):
        raise BrokenReplyError(f"the reply is not a chat completion: {_problem(content)}") from None
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
        str(content["model"]) if content.get("model") else None,
    )


def _text(content: Any) -> str | None:
    if content is None or isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")  # a list of parts


def _count(value: Any) -> int | None:
    known = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
    return value if known else None


def _problem(content: Any) -> str:
    error = content.get("error") if isinstance(content, dict) else None
    message = error.get("message") if isinstance(error, dict) else error
    return " ".join(str(message or content).split())[:300]
