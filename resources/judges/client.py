"""Many concurrent judge calls: each paid for once, each reply kept.

`judge_calls` looks up every call in the ledger and sends only those without an outcome. Calls go through a
sliding window (a slow reply delays no other), within the endpoint's limits and the budget; a reply is in the
ledger before the caller sees it. However a batch ends (an error, Ctrl-C, kill -9, budget spent), the next run
resumes it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime

import polars as pl

from resources.judges.call import Call, Progress, Reply, Request, Tally, prepare, reply_of
from resources.judges.engine import Engine
from resources.judges.forecast import estimate, highest_usd
from resources.judges.gate import Budget
from resources.judges.ledger import Ledger
from resources.judges.ledger_records import outcomes
from resources.judges.retry import RetryPolicy
from textalign_dagster.ids import content_hash
from textalign_dagster.settings.judge import Judge

PROGRESS_S = 0.5
log = logging.getLogger(__name__)


def judge_calls(
    calls: Sequence[Call],
    judge: Judge,
    ledger: Ledger,
    progress: Progress | None = None,
    *,
    policy: RetryPolicy | None = None,
    tally: Tally | None = None,
    retry_before: datetime | None = None,
) -> list[Reply]:
    """The replies, in the order of ``calls``; a call with an outcome in the ledger is not sent.

    A call that was given up is a `Reply` with status "failed". The event loop runs in a separate thread;
    ``progress(done, total, note)`` is called in the caller's.

    Args:
        tally: updated as calls end.
        retry_before: calls that were given up before this time are sent again.

    Raises:
        BatchPendingError: the calls are with the Batch API, and this process does not wait.
        JudgeStoppedError: the endpoint refuses every call, or is down, or the key is missing.
        BudgetExceededError: the next call could exceed the budget; it is not sent.
        ArtifactError: the ledger cannot be read or saved.
    """
    tally = tally if tally is not None else Tally()
    report = progress or (lambda *_: None)
    requests = [prepare(call, judge) for call in calls]
    unique = {request.key: request for request in requests}
    batch_id = content_hash("batch", sorted(unique))
    with contextlib.ExitStack() as held:
        if judge.batch is None:  # the Batch API needs no lock: its jobs are in the store

            def waiting() -> None:
                log.info("another process is making the same %d calls; waiting for its replies", len(unique))
                report(0, len(unique), "another process is making the same calls; waiting for it")

            held.enter_context(ledger.alone(batch_id, waiting))
        compaction = ledger.compact_if_due()
        rows = ledger.rows([key for request in unique.values() for key in request.known_as])
        for damage in [*(compaction.damages if compaction is not None else ()), *ledger.damages]:
            log.warning("%s", damage)
        replies = _known(unique, rows, retry_before)
        if judge.batch is not None:
            from resources.judges.batch import batch_replies, calls_in_progress

            sent_again = calls_in_progress(ledger.storage)
            replies = {
                k: reply for k, reply in replies.items() if reply.status == "ok" or k not in sent_again
            }
        worked = [r for key in replies if (r := _answered(unique[key], replies[key])) is not None]
        tally.total, tally.cached, tally.lost = len(unique), len(worked), _lost(rows)
        tally.failed = len(replies) - len(worked)
        report(tally.done, tally.total, tally.note(0))
        missing = [request for key, request in unique.items() if key not in replies]
        mine = rows.filter(pl.col("batch_id") == batch_id)  # rows of this batch's earlier runs
        if judge.batch is not None:
            replies |= batch_replies(
                missing,
                judge,
                ledger,
                scope=batch_id,
                spent=float(mine["usd"].sum()),
                tally=tally,
                progress=report,
                retry_before=retry_before,
            )
        elif missing:
            budget = _resumed(judge, unique, mine)
            past = estimate(ledger, judge, missing[0].params)
            engine = Engine(judge, ledger, budget, policy or RetryPolicy(), past, batch_id, tally, worked)
            _run(engine, missing, report)
            replies |= engine.replies
    return [replies[request.key] for request in requests]


def _known(
    unique: Mapping[str, Request], rows: pl.DataFrame, retry_before: datetime | None
) -> dict[str, Reply]:
    """The outcomes that are in the ledger; a reply takes precedence over a failure."""
    found = outcomes(rows, retry_before)
    known = {}
    for key, request in unique.items():
        records = [found[name] for name in request.known_as if name in found]
        if records:
            best = next((record for record in records if record.status == "ok"), records[0])
            known[key] = reply_of(best, from_ledger=True)
    return known


def _answered(request: Request, reply: Reply) -> Request | None:
    """The request as it was sent for this reply; None if the reply is a failure."""
    if reply.status != "ok":
        return None
    return request if request.plain is None or reply.call_key == request.key else request.plain


def _lost(rows: pl.DataFrame) -> int:
    """The number of replies in these rows that may have been paid for but were not received."""
    over = rows.filter(pl.col("status") != "sent")
    return int(over["lost_replies"].sum()) + over.filter(pl.col("status") == "lost").height


def _resumed(judge: Judge, unique: Mapping[str, Request], rows: pl.DataFrame) -> Budget:
    """The judge's budget, less what earlier runs of the batch spent (``rows``)."""
    highest = {key: highest_usd(r, judge) for r in unique.values() for key in r.known_as}
    uncertain = sum(
        highest[key] * _lost(group) for (key,), group in rows.filter(
            (pl.col("lost_replies") > 0) | (pl.col("status") == "lost")
        ).group_by("call_key")
    )  # fmt: skip
    return Budget(judge.budget_usd, float(rows["usd"].sum()), uncertain)


def _run(engine: Engine, missing: Sequence[Request], report: Progress) -> None:
    """Run the engine in a thread; after an interrupt, calls in flight get a moment to finish."""
    over = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            asyncio.run(engine.run(missing))
        except BaseException as error:  # noqa: BLE001  # re-raised in the caller's thread
            failures.append(error)
        finally:
            over.set()

    thread = threading.Thread(target=work, name="judge", daemon=True)
    started = time.monotonic()
    thread.start()
    try:
        while not over.wait(PROGRESS_S):
            report(engine.tally.done, engine.tally.total, engine.tally.note(time.monotonic() - started))
    except BaseException as interrupt:
        engine.cancel()
        try:
            over.wait()
        finally:
            engine.cancel(at_once=True)  # interrupted again
            over.wait()
            for failure in failures:
                interrupt.add_note(str(failure))
        raise
    thread.join()
    report(engine.tally.done, engine.tally.total, engine.tally.note(time.monotonic() - started))
    if failures:
        raise failures[0]
