"""The ledger's table of judge calls: its columns, its rows as lines of a segment, the outcome of a call."""

from __future__ import annotations

import io
import json
from datetime import UTC, datetime
from typing import Any, NamedTuple

import polars as pl

CALL_STATUSES = ("ok", "failed", "stopped", "lost", "sent")
"""How a call ended. ``ok``: a reply was received (whatever its content). ``failed``: given up while the endpoint
answered other calls; sent again only on request (``--retry-failed``). ``stopped``: the run ended before the
call had an outcome; the next run sends it again. ``lost``: its process was killed, so it may have been paid
for; the next run sends it again. ``sent``: in flight."""

INTERRUPTED = (
    "stopped while in flight"  # in ledgers written before ``stopped`` existed, the status is ``failed``
)

FEEDBACK_CALLS = pl.Schema(
    {  # type: ignore[arg-type]  # mypy joins type classes and instances to object
        "call_key": pl.String,  # hash(model, endpoint, params, messages, response_format, repeat)
        "judge": pl.String,  # the model, as requested
        "endpoint": pl.String,  # address without credentials
        "messages_hash": pl.String,
        "params": pl.String,  # JSON: decoding, and response_format where there is one
        "repeat": pl.Int32,  # 0, 1, … when the same question is asked again
        "order_shown": pl.String,  # what was shown in which order, in the caller's notation
        "raw_reply": pl.String,  # the text of the reply, unparsed; NULL if none
        "refusal": pl.String,  # the judge's refusal, where the endpoint reports it separately
        "finish_reason": pl.String,  # "stop", "length", "content_filter", …
        "status": pl.String,  # one of CALL_STATUSES
        "error": pl.String,  # why not ok
        "attempts": pl.Int32,  # requests sent for this row
        "lost_replies": pl.Int32,  # how many of these may have been paid for without a reply
        "chars_in": pl.Int64,  # characters of the messages (and of the schema)
        "tokens_in": pl.Int64,  # as counted by the endpoint; NULL: not reported
        "tokens_cached": pl.Int64,  # of tokens_in
        "tokens_out": pl.Int64,
        "usd": pl.Float64,  # by the judge's prices; NULL: no prices
        "latency_s": pl.Float64,  # of the last attempt
        "called_at": pl.Datetime("us", "UTC"),  # first attempt; with call_key, identifies a row
        "fingerprint": pl.String,  # the endpoint's system_fingerprint
        "batch_id": pl.String,  # hash of the batch's call keys: the scope of a budget
        "purpose": pl.String,  # e.g. "pep8_alt_lmu|003 feedback"; "probe": tested whether the endpoint is up
        "reply_model": pl.String,  # the model named in the reply; NULL: none, or written before this column existed
    }
)

IDENTITY = ["call_key", "called_at"]
STATUS_RANK = {"lost": 1, "sent": 2}  # among rows of one identity, the lowest counts; others are 0
LINE_SCHEMA = pl.Schema({**FEEDBACK_CALLS, "called_at": pl.String()})


class CallRecord(NamedTuple):  # not a dataclass: one lookup creates a hundred thousand
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
    reply_model: str | None = None

    def line(self) -> bytes:
        """The row as a line of a segment."""
        plain = {name: _clean(value) for name, value in self._asdict().items() if value is not None}
        plain["called_at"] = self.called_at.astimezone(UTC).isoformat(timespec="microseconds")
        return json.dumps(plain, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def outcomes(rows: pl.DataFrame, retry_before: datetime | None = None) -> dict[str, CallRecord]:
    """The outcome of each call key among ``rows`` (`FEEDBACK_CALLS`, ordered): first reply, else last failure.

    Calls that were stopped or lost have none; nor do, with ``retry_before``, those that failed before then.
    """
    given_up = (pl.col("status") == "failed") & pl.col("error").ne_missing(INTERRUPTED)
    if retry_before is not None:
        given_up &= pl.col("called_at") >= retry_before
    failed = rows.filter(given_up).unique("call_key", keep="last")
    received = rows.filter(pl.col("status") == "ok").unique("call_key", keep="first")
    ended = pl.concat([failed, received]).select(CallRecord._fields).iter_rows()
    return {record.call_key: record for record in map(CallRecord._make, ended)}


def no_calls() -> pl.DataFrame:
    return pl.DataFrame(schema=FEEDBACK_CALLS)


def one_row_a_call(rows: pl.DataFrame) -> pl.DataFrame:
    """One row per identity: the row of the call's end, else the ``lost`` one, else the ``sent`` one."""
    rank = pl.col("status").replace_strict(STATUS_RANK, default=0, return_dtype=pl.Int8)
    # Of two ``sent`` lines, that of the later attempt.
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
                damages.append(f"{place}: line {number} is damaged and was skipped")
        frame = pl.DataFrame(kept, schema=LINE_SCHEMA)
    return frame.with_columns(pl.col("called_at").str.to_datetime("%+", time_unit="us", time_zone="UTC"))


def _clean(value: Any) -> Any:
    """Valid Unicode: lone surrogates, which JSON can carry, become '?'."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return value.encode(errors="replace").decode()
    return value
