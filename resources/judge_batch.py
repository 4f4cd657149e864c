"""Judging through the Batch API: half the price, an answer within a day, and nothing lost meanwhile.

A batch lives as a *job*, two files in the store, so that whoever comes next goes on with it::

    ledger/batches/{name}.json      whom it asked, what for, the endpoint's ids, its state
    ledger/batches/{name}.jsonl     the requests, as they are (or were) uploaded

``intended`` → ``open`` → ``collected``. The job is written before anything is sent and names itself
in the batch's metadata, so a process killed between "sent" and "written down" finds its batch again
instead of paying for another. Replies go into the ledger of calls, as those of live calls do; a job
collected twice gives the same rows. Who asks for the replies removes the job: until then a call that
failed in it counts as failed, and is asked anew only when somebody asks again.
"""

from __future__ import annotations

import contextlib
import json
import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any, Final, Literal

import openai

from resources.api_key import ApiKey, ApiKeyError
from resources.judge_call import (
    BrokenReplyError,
    Completion,
    Reply,
    Request,
    highest_usd,
    read_completion,
    reply_of,
)
from resources.judge_errors import BatchPendingError, BudgetExceededError, JudgeError, JudgeStoppedError
from resources.judge_tally import Tally
from resources.ledger import CallRecord, Ledger
from resources.retry import classify
from resources.storage import Storage
from textalign_dagster.ids import canonical_json
from textalign_dagster.judge_settings import Judge
from textalign_dagster.progress import somebody_waits

FOLDER = "ledger/batches"
URL: Final = "/v1/chat/completions"
LARGEST = 100 * 2**20  # bytes of a file of requests; OpenAI takes 200 MB
OVER = ("completed", "failed", "expired", "cancelled")
MINE = "textalign_job"  # the metadata of a batch that name its job

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Asked:
    """One request of a job: what its row in the ledger will say beside the reply."""

    call_key: str
    messages_hash: str
    repeat: int
    order_shown: str | None
    chars: int
    highest_usd: float


@dataclass(frozen=True)
class Job:
    """A batch, from the intention to ask until its replies have been taken.

    ``scope`` is the hash of all calls of the stage that asked; ``purpose`` the cell, for people and
    for the sensor. ``judge`` holds the settings needed to fetch and price replies, and no key.
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
    """Writes the job down, whole or not at all."""
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
    """Removes a job whose replies have been taken."""
    storage.remove(job.path)
    storage.remove(job.requests_path)


def batch_replies(
    missing: Sequence[Request],
    judge: Judge,
    ledger: Ledger,
    storage: Storage,
    *,
    scope: str,
    spent: float,
    tally: Tally,
    progress: Progress,
) -> dict[str, Reply]:
    """The replies to requests the ledger has no reply to, by key.

    Sends what no job has asked yet. Polls until all is answered, if somebody waits.

    Args:
        scope: a hash of all calls of the stage.
        spent: USD of the scope so far, for the budget.

    Raises:
        BatchPendingError: batches are under way, and nobody waits here.
        BudgetExceededError: before anything is sent that could exceed the budget.
        JudgeStoppedError: the key is missing, or the endpoint refuses the batch.
    """
    assert judge.batch is not None
    endpoint = Endpoint(judge)
    wanted = {request.key: request for request in missing}
    mine = [job for job in jobs(storage) if wanted.keys() & {row.call_key for row in job.asked}]
    taken = {row.call_key for job in mine for row in job.asked}
    new = [request for key, request in wanted.items() if key not in taken]
    if new:
        highest = sum(highest_usd(request, judge) for request in new) * judge.batch.price_factor
        if judge.budget_usd is not None and spent + highest > judge.budget_usd:
            raise BudgetExceededError(
                f"a batch of {len(new):,} calls could cost ${highest:.2f}, with ${spent:.2f} spent already; "
                f"budget_usd is {judge.budget_usd:g}: raise it, or judge less"
            )
        for part in parts(new, judge):
            mine.append(intend(storage, judge, part, scope))
    ours = [job.state == "intended" and job.scope == scope for job in mine]
    mine = [endpoint.submit(storage, job) if own else job for job, own in zip(mine, ours, strict=True)]
    pause = threading.Event()
    while True:
        mine = [endpoint.collect(storage, ledger, job) for job in mine]
        left = [job for job in mine if job.state != "collected"]
        done = tally.total - len(wanted) + sum(_answered(job, wanted) for job in mine)
        note = f"{len(left)} of {len(mine)} batches under way"
        progress(done, tally.total, note)
        if not left:
            break
        if not somebody_waits():
            ids = ", ".join(job.id or job.name for job in left)
            raise BatchPendingError(
                f"{sum(len(job.asked) for job in left):,} calls are with the Batch API of {judge.endpoint} ({ids}); "
                "the sensor `collect_batches` fetches the replies and goes on, and so does running this again",
                [job.name for job in left],
            )
        pause.wait(judge.batch.poll_s)
    ledger.flush()
    replies = {key: reply_of(record, from_ledger=False) for key, record in _outcomes(ledger, mine, wanted)}
    for job in mine:
        if job.scope == scope:
            forget(storage, job)
    for reply in replies.values():
        tally.received += reply.status == "ok"
        tally.failed += reply.status != "ok"
        tally.usd += reply.usd or 0.0
        tally.requests += 1
    return replies


def parts(requests: Sequence[Request], judge: Judge) -> Iterator[list[Request]]:
    """The requests in files that the endpoint takes."""
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
    body: dict[str, Any] = {"model": judge.model, "messages": [dict(m) for m in request.call.messages]}
    body |= judge.decoding.params()
    if request.response_format is not None:
        body["response_format"] = request.response_format
    return json.dumps({"custom_id": request.key, "method": "POST", "url": URL, "body": body}).encode() + b"\n"


def intend(storage: Storage, judge: Judge, requests: Sequence[Request], scope: str) -> Job:
    """Writes a job down before anything is sent."""
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
        """Sends an intended job, unless it was sent by a process that could not write that down."""
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

    def collect(self, storage: Storage, ledger: Ledger, job: Job) -> Job:
        """Where the job stands now; when its batch is over, its replies are in the ledger."""
        if job.state != "open":
            return job
        assert job.id is not None
        with self._readable():
            batch = self._client.batches.retrieve(job.id)
            if batch.status not in OVER:
                counts = batch.request_counts
                return replace(job, answered=counts.completed + counts.failed if counts else 0)
            outputs = [
                self._client.files.content(file_id).content
                for file_id in (batch.output_file_id, batch.error_file_id)
                if file_id
            ]
        told = "; ".join(str(error.message) for error in (batch.errors.data or [])) if batch.errors else ""
        unanswered = f"the batch {job.id} is {batch.status}" + (f": {told}" if told else "")
        for record in self._records(job, outputs, unanswered):
            ledger.add(record)
        ledger.flush()  # the job must not say "collected" before its replies are safe
        done = replace(job, state="collected", answered=len(job.asked))
        save(storage, done)
        return done

    def _records(self, job: Job, outputs: Sequence[bytes], unanswered: str) -> Iterator[CallRecord]:
        """One row of the ledger for each request; what has no line is failed, with the batch's fate."""
        lines: dict[str, Mapping[str, Any]] = {}
        for output in outputs:
            for text in output.splitlines():
                found = json.loads(text)
                lines.setdefault(found["custom_id"], found)
        for asked in job.asked:
            completion, error = self._read(lines.get(asked.call_key), unanswered)
            yield self._row(job, asked, completion, error)

    def _read(self, found: Mapping[str, Any] | None, unanswered: str) -> tuple[Completion | None, str | None]:
        if found is None:
            return None, unanswered
        response, error = found.get("response") or {}, found.get("error") or {}
        status = response.get("status_code")
        if status != 200:
            body = response.get("body") or {}
            said = error.get("message") or (body.get("error") or {}).get("message") or "no explanation"
            return None, f"HTTP {status}: {said}" if status else str(said)
        try:
            return read_completion(json.dumps(response.get("body")).encode()), None
        except BrokenReplyError as broken:
            return None, str(broken)

    def _row(self, job: Job, asked: Asked, got: Completion | None, error: str | None) -> CallRecord:
        hide = self._key.hide
        return CallRecord(
            call_key=asked.call_key,
            judge=self._judge.model,
            endpoint=self._judge.endpoint,
            messages_hash=asked.messages_hash,
            params=job.params,
            repeat=asked.repeat,
            order_shown=asked.order_shown,
            raw_reply=None if got is None or got.text is None else hide(got.text),
            refusal=None if got is None or got.refusal is None else hide(got.refusal),
            finish_reason=None if got is None else got.finish_reason,
            status="failed" if got is None else "ok",
            error=None if error is None else hide(error),
            attempts=1,
            lost_replies=0,
            chars_in=asked.chars,
            tokens_in=got.tokens_in if got else None,
            tokens_cached=got.tokens_cached if got else None,
            tokens_out=got.tokens_out if got else None,
            usd=self._usd(asked, got),
            latency_s=None,
            # The same however often it is collected: with the key, it names the row.
            called_at=datetime.fromisoformat(job.created_at),
            fingerprint=got.fingerprint if got else None,
            batch_id=job.scope,
            purpose=job.purpose,
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
        """Turns the client's errors into one sentence; the same again goes on."""
        try:
            yield
        except openai.OpenAIError as error:
            fault = classify(error, self._judge.limits.timeout_s)
            told = fault.message if fault is not None else str(error)
            raise JudgeStoppedError(
                self._key.hide(f"the Batch API of {self._judge.endpoint}: {told}")
            ) from None


def _answered(job: Job, wanted: Mapping[str, Request]) -> int:
    if job.state != "collected":
        return min(job.answered, len(job.asked))
    return sum(row.call_key in wanted for row in job.asked)


def _outcomes(
    ledger: Ledger, done: Sequence[Job], wanted: Mapping[str, Request]
) -> Iterator[tuple[str, CallRecord]]:
    """The row of each wanted call: its reply, or how it failed in these jobs."""
    rows = ledger.rows(list(wanted))
    at = {row.call_key: datetime.fromisoformat(job.created_at) for job in done for row in job.asked}
    records = [CallRecord._make(row) for row in rows.select(CallRecord._fields).iter_rows()]
    best: dict[str, CallRecord] = {}
    for record in records:
        if record.status == "ok" or record.called_at == at[record.call_key]:
            known = best.get(record.call_key)
            if known is None or known.status != "ok":
                best[record.call_key] = record
    yield from best.items()


def collect_all(storage: Storage, ledger: Ledger) -> tuple[list[Job], list[str]]:
    """Fetches what is ready, of all experiments; calls nobody anew.

    Returns:
        All jobs as they stand now, and what went wrong, a sentence each (others are still looked at).
    """
    found, problems = [], []
    for job in jobs(storage):
        try:
            found.append(Endpoint(job.settings).collect(storage, ledger, job))
        except JudgeError as error:
            problems.append(f"{job.name}: {error}")
            found.append(job)
    return found, problems
