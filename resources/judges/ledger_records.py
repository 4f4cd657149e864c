"""A row of the ledger, as a line of a segment and as one of several of the same call."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from typing import Any, NamedTuple

import polars as pl

from resources.judges.ledger_table import FEEDBACK_CALLS

IDENTITY = ["call_key", "called_at"]
STATUS_RANK = {"lost": 1, "sent": 2}  # of two rows of one identity the lesser counts; the others are 0
LINE_SCHEMA = pl.Schema({**FEEDBACK_CALLS, "called_at": pl.String()})


class CallRecord(NamedTuple):  # not a dataclass: a hundred thousand are made in one lookup
    """A row of `FEEDBACK_CALLS`; see there for the columns."""

    call_key: str
    judge: str
    endpoint: str
    messages_hash: str
    params: str
    repeat: int
    order_shown: str | None
    raw_reply: str | None
    refusal: str | None
    finish_reason: str | None
    status: str
    error: str | None
    attempts: int
    lost_replies: int
    chars_in: int
    tokens_in: int | None
    tokens_cached: int | None
    tokens_out: int | None
    usd: float | None
    latency_s: float | None
    called_at: datetime
    fingerprint: str | None
    batch_id: str
    purpose: str

    def line(self) -> bytes:
        """The row as a line of a segment."""
        plain = {name: _clean(value) for name, value in self._asdict().items() if value is not None}
        plain["called_at"] = self.called_at.astimezone(UTC).isoformat(timespec="microseconds")
        return json.dumps(plain, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def first_replies(rows: pl.DataFrame) -> dict[str, CallRecord]:
    """The first received reply to each call key among ``rows`` (`FEEDBACK_CALLS`, ordered)."""
    received = rows.filter(pl.col("status") == "ok").unique("call_key", keep="first")
    made = map(CallRecord._make, received.select(CallRecord._fields).iter_rows())
    return {record.call_key: record for record in made}


def no_calls() -> pl.DataFrame:
    return pl.DataFrame(schema=FEEDBACK_CALLS)


def one_row_a_call(rows: pl.DataFrame) -> pl.DataFrame:
    """One row of each identity: how the call ended, else that it is lost, else that it was sent."""
    rank = pl.col("status").replace_strict(STATUS_RANK, default=0, return_dtype=pl.Int8)
    # Of two lines "sent", the one of the later attempt.
    ordered = rows.sort(rank, -pl.col("attempts"), maintain_order=True)
    return ordered.unique(IDENTITY, keep="first", maintain_order=True)


def parse_lines(data: bytes, place: str, damages: list[str]) -> pl.DataFrame:
    if not data:
        return no_calls()
    try:
        frame = pl.read_ndjson(io.BytesIO(data), schema=LINE_SCHEMA)
    except pl.exceptions.PolarsError:
        kept = []
        for number, line in enumerate(data.splitlines(), 1):
            try:
                row = json.loads(line)
                kept.append({name: row.get(name) for name in LINE_SCHEMA})
            except (ValueError, AttributeError):
                damages.append(f"{place}: line {number} is damaged and was left out")
        frame = pl.DataFrame(kept, schema=LINE_SCHEMA)
    return frame.with_columns(pl.col("called_at").str.to_datetime("%+", time_unit="us", time_zone="UTC"))


def _clean(value: Any) -> Any:
    """Text that every reader can read: lone surrogates, which JSON can carry, become '?'."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode(errors="replace").decode()
    return value
