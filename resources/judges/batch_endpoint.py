"""The Batch API of a judge's endpoint: files of requests out, replies into the ledger of calls."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

import openai

from resources.judges.api_key import ApiKey, ApiKeyError
from resources.judges.batch_jobs import URL, Asked, Job, save
from resources.judges.call import BrokenReplyError, Completion, read_completion
from resources.judges.errors import JudgeStoppedError
from resources.judges.ledger import Ledger
from resources.judges.ledger_records import CallRecord
from resources.judges.retry import classify
from resources.store.storage import Storage
from textalign_dagster.settings.judge import Judge

OVER = ("completed", "failed", "expired", "cancelled")
MINE = "textalign_job"  # the metadata of a batch that name its job


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
