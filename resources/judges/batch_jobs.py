"""Batches of judge calls as they are written down: a *job* each, two files in the store.

::

    ledger/batches/{name}.json      whom it asked, what for, the endpoint's ids, its state
    ledger/batches/{name}.jsonl     the requests, as they are (or were) uploaded
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any, Final, Literal

from resources.judges.call import Request, highest_usd
from resources.store.storage import Storage
from textalign_dagster.ids import canonical_json
from textalign_dagster.settings.judge import Judge

FOLDER = "ledger/batches"
URL: Final = "/v1/chat/completions"
LARGEST = 100 * 2**20  # bytes of a file of requests; OpenAI takes 200 MB


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
