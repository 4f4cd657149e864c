"""Batches of judge calls: stored as *jobs*, two files each, and sent through the endpoint's Batch API.

::

    ledger/batches/{name}.json      judge, purpose, the endpoint's ids, state
    ledger/batches/{name}.jsonl     the requests, as uploaded
"""

from __future__ import annotations

import contextlib
import json
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, Literal

import openai

from resources.judges.api_key import ApiKey, ApiKeyError
from resources.judges.call import BrokenReplyError, Completion, Request, read_completion
from resources.judges.errors import JudgeStoppedError
from resources.judges.forecast import highest_usd
from resources.judges.ledger import Ledger
from resources.judges.ledger_records import CallRecord
from resources.judges.retry import classify
from resources.store.storage import Storage
from textalign_dagster.ids import canonical_json
from textalign_dagster.settings.judge import Judge

FOLDER = "ledger/batches"
URL: Final = "/v1/chat/completions"
LARGEST = 100 * 2**20  # bytes of a request file; OpenAI accepts 200 MB
OVER = ("completed", "failed", "expired", "cancelled")
MINE = "textalign_job"  # in the metadata of a batch: the name of its job


@dataclass(frozen=True)
class Asked:
    """One request of a job: the columns of its ledger row that are known before the reply."""

    call_key: str
    messages_hash: str
    repeat: int
    order_shown: str | None
    chars: int
    highest_usd: float


@dataclass(frozen=True)
class Job:
    """A batch, from before it is sent until its replies have been read.

    ``scope`` is the hash of all calls of the stage; ``purpose`` names the cell. ``judge``
    holds the settings needed to fetch and price replies, but no key.
    """

    name: str
    state: Literal["intended", "open", "collected"]
    judge: dict[str, Any]
    params: str
    scope: str
    purpose: str
    created_at: str
    asked: tuple[Asked, ...]
    id: str | None = None
    answered: int = 0

    @property
    def path(self) -> str:
        return f"{FOLDER}/{self.name}.json"

    @property
    def requests_path(self) -> str:
        return f"{FOLDER}/{self.name}.jsonl"

    @property
    def settings(self) -> Judge:
        return Judge.model_validate(self.judge)


def save(storage: Storage, job: Job) -> None:
    """Stores the job atomically."""
    storage.replace(job.path, canonical_json(asdict(job)).encode())


def jobs(storage: Storage) -> list[Job]:
    """All jobs of the store, oldest first."""
    found = []
    for path in storage.entries(FOLDER):
        data = storage.read(path) if path.endswith(".json") else None
        if data is None:
            continue
        content = json.loads(data)
        found.append(Job(**{**content, "asked": tuple(Asked(**row) for row in content["asked"])}))
    return sorted(found, key=lambda job: (job.created_at, job.name))


def forget(storage: Storage, job: Job) -> None:
    """Removes a job whose replies have been read."""
    storage.remove(job.path)
    storage.remove(job.requests_path)


def parts(requests: Sequence[Request], judge: Judge) -> Iterator[list[Request]]:
    """The requests, split into files that the endpoint accepts."""
    assert judge.batch is not None
    part: list[Request] = []
    size = 0
    for request in requests:
        length = len(line(request, judge))
        if part and (len(part) == judge.batch.requests or size + length > LARGEST):
            yield part
            part, size = [], 0
        part.append(request)
        size += length
    if part:
        yield part


def line(request: Request, judge: Judge) -> bytes:
    """A request as a line of the file to upload."""
    sent = {"custom_id": request.key, "method": "POST", "url": URL, "body": request.body(judge)}
    return json.dumps(sent).encode() + b"\n"


def intend(storage: Storage, judge: Judge, requests: Sequence[Request], scope: str) -> Job:
    """Creates a job and stores it before anything is sent."""
    job = Job(
        name=f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(4)}",
        state="intended",
        judge=judge.model_dump(mode="json"),
        params=requests[0].params,
        scope=scope,
        purpose=requests[0].call.purpose,
        created_at=datetime.now(UTC).isoformat(timespec="microseconds"),
        asked=tuple(
            Asked(
                call_key=request.key,
                messages_hash=request.messages_hash,
                repeat=request.call.repeat,
                order_shown=request.call.order_shown,
                chars=request.chars,
                highest_usd=highest_usd(request, judge),
            )
            for request in requests
        ),
    )
    storage.replace(job.requests_path, b"".join(line(request, judge) for request in requests))
    save(storage, job)
    return job


class Endpoint:
    """The Batch API of a judge's endpoint."""

    def __init__(self, judge: Judge) -> None:
        try:
            self._key = ApiKey(judge)
        except ApiKeyError as error:
            raise JudgeStoppedError(str(error)) from None
        self._judge = judge
        self._client = self._key.blocking_client(judge)

    def submit(self, storage: Storage, job: Job) -> Job:
        """Sends an intended job, unless a process that was killed has already sent it."""
        assert self._judge.batch is not None
        with self._readable():
            batch_id = self._sent_before(job)
            if batch_id is None:
                data = storage.read(job.requests_path)
                assert data is not None, "written before the job"
                file = self._client.files.create(file=(f"{job.name}.jsonl", data), purpose="batch")
                batch = self._client.batches.create(
                    input_file_id=file.id,
                    endpoint=URL,
                    completion_window=self._judge.batch.window,
                    metadata={MINE: job.name},
                )
                batch_id = batch.id
        sent = replace(job, state="open", id=batch_id)
        save(storage, sent)
        return sent

    def _sent_before(self, job: Job) -> str | None:
        since = datetime.fromisoformat(job.created_at).timestamp() - 60  # clocks differ
        for batch in self._client.batches.list(limit=100):
            if batch.created_at < since:
                return None
            if (batch.metadata or {}).get(MINE) == job.name:
                return str(batch.id)
        return None

    def collect(self, ledger: Ledger, job: Job) -> Job:
        """The job in its current state; if its batch has ended, its replies are now in the ledger."""
        if job.state != "open":
            return job
        assert job.id is not None
        outputs: list[bytes] = []
        with self._readable():
            try:
                batch = self._client.batches.retrieve(job.id)
                if batch.status not in OVER:
                    counts = batch.request_counts
                    return replace(job, answered=counts.completed + counts.failed if counts else 0)
                errors = (batch.errors.data or []) if batch.errors else []
                why = "; ".join(str(error.message) for error in errors)
                unanswered = f"the batch {job.id} is {batch.status}{f': {why}' if why else ''}"
                for file_id in (batch.output_file_id, batch.error_file_id):
                    if file_id:
                        outputs.append(self._client.files.content(file_id).content)
            except openai.NotFoundError:  # retrying will not bring it back
                unanswered = f"the endpoint no longer has the batch {job.id} or its replies (HTTP 404)"
        for record in self._records(job, outputs, unanswered):
            ledger.add(record)
        ledger.flush()  # the job must not become "collected" before its replies are safe
        done = replace(job, state="collected", answered=len(job.asked))
        save(ledger.storage, done)
        return done

    def _records(self, job: Job, outputs: Sequence[bytes], unanswered: str) -> Iterator[CallRecord]:
        """One ledger row per request; a request without a line has failed, with the reason ``unanswered``."""
        lines: dict[str, Mapping[str, Any]] = {}
        for output in outputs:
            for text in output.splitlines():
                with contextlib.suppress(ValueError, RecursionError):  # an unreadable line counts as missing
                    found = json.loads(text)
                    if isinstance(found, dict):
                        lines.setdefault(str(found.get("custom_id")), found)
        for asked in job.asked:
            completion, error = self._read(lines.get(asked.call_key), unanswered)
            yield self._row(job, asked, completion, error)

    def _read(self, found: Mapping[str, Any] | None, unanswered: str) -> tuple[Completion | None, str | None]:
        if found is None:
            return None, unanswered
        response = _mapping(found, "response")
        status, body = response.get("status_code"), response.get("body")
        if status != 200:
            of_body = _mapping(_mapping(response, "body"), "error")
            message = _mapping(found, "error").get("message") or of_body.get("message") or "no explanation"
            return None, f"HTTP {status}: {message}" if status else str(message)
        try:
            return read_completion(json.dumps(body).encode()), None
        except BrokenReplyError as broken:
            return None, str(broken)

    def _row(self, job: Job, asked: Asked, got: Completion | None, error: str | None) -> CallRecord:
        reply, hide = got or Completion(), self._key.hide
        return CallRecord(
            call_key=asked.call_key,
            judge=self._judge.model,
            endpoint=self._judge.endpoint,
            messages_hash=asked.messages_hash,
            params=job.params,
            repeat=asked.repeat,
            order_shown=asked.order_shown,
            raw_reply=hide(reply.text),
            refusal=hide(reply.refusal),
            finish_reason=hide(reply.finish_reason),
            status="failed" if got is None else "ok",
            error=hide(error),
            attempts=1,
            lost_replies=0,
            chars_in=asked.chars,
            tokens_in=reply.tokens_in,
            tokens_cached=reply.tokens_cached,
            tokens_out=reply.tokens_out,
            usd=self._usd(asked, got),
            latency_s=None,
            # The same whenever the job is collected: with the key, it identifies the row.
            called_at=datetime.fromisoformat(job.created_at),
            fingerprint=hide(reply.fingerprint),
            batch_id=job.scope,
            purpose=job.purpose,
            reply_model=hide(reply.model),
        )

    def _usd(self, asked: Asked, got: Completion | None) -> float | None:
        prices, batch = self._judge.prices, self._judge.batch
        if prices is None or got is None or batch is None:
            return None
        if got.tokens_in is None or got.tokens_out is None:
            return asked.highest_usd * batch.price_factor
        return prices.usd(got.tokens_in, got.tokens_out, got.tokens_cached or 0) * batch.price_factor

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """Turns the client's errors into a one-sentence `JudgeStoppedError`; another run resumes."""
        try:
            yield
        except openai.OpenAIError as error:
            fault = classify(error, self._judge.limits.timeout_s)
            problem = str(error) if fault is None else "; ".join(filter(None, [fault.message, fault.remedy]))
            raise JudgeStoppedError(
                self._key.hide(f"the Batch API of {self._judge.endpoint}: {problem}")
            ) from None


def _mapping(found: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A field that should be an object; an empty dict if it is anything else."""
    value = found.get(name)
    return value if isinstance(value, dict) else {}
