"""The table of judge calls: the ledger that all experiments of a store share."""

from __future__ import annotations

import polars as pl

CALL_STATUSES = ("ok", "failed", "lost", "sent")
"""What became of a call. ``ok``: a reply was received (whatever it says). ``failed``: it was given
up after the last attempt. ``lost``: its process was killed meanwhile, so it may have been paid for.
``sent``: it is in flight."""

FEEDBACK_CALLS = pl.Schema(
    {  # type: ignore[arg-type]  # mypy joins type classes and instances to object
        "call_key": pl.String,  # hash(model, endpoint, params, messages, response_format, repeat)
        "judge": pl.String,  # the model's snapshot, as asked for
        "endpoint": pl.String,  # address without credentials
        "messages_hash": pl.String,
        "params": pl.String,  # JSON: decoding, and response_format where there is one
        "repeat": pl.Int32,  # 0, 1, … when the same question is asked again
        "order_shown": pl.String,  # what was shown in which order, as the caller writes it
        "raw_reply": pl.String,  # the reply's words, unparsed; NULL without any
        "refusal": pl.String,  # the judge's refusal, where the endpoint tells it apart
        "finish_reason": pl.String,  # "stop", "length", "content_filter", …
        "status": pl.String,  # one of CALL_STATUSES
        "error": pl.String,  # why not ok
        "attempts": pl.Int32,  # requests sent for this row
        "lost_replies": pl.Int32,  # of these, how many may have been paid for without a reply
        "chars_in": pl.Int64,  # characters of the messages (and of the schema)
        "tokens_in": pl.Int64,  # as the endpoint counted them; NULL: it did not say
        "tokens_cached": pl.Int64,  # of tokens_in
        "tokens_out": pl.Int64,
        "usd": pl.Float64,  # by the judge's prices; NULL: no prices
        "latency_s": pl.Float64,  # of the last attempt
        "called_at": pl.Datetime("us", "UTC"),  # first attempt; with call_key, what names a row
        "fingerprint": pl.String,  # the endpoint's system_fingerprint
        "batch_id": pl.String,  # hash of the batch's call keys: the scope of a budget
        "purpose": pl.String,  # e.g. "pep8_alt_lmu|003 feedback"
    }
)
