"""Judging through the Batch API: half the price, an answer within a day, and nothing lost meanwhile.

A batch lives as a job in the store (`batch_jobs`), so that whoever comes next goes on with it:
``intended`` → ``open`` → ``collected``. The job is written before anything is sent and names itself
in the batch's metadata, so a process killed between "sent" and "written down" finds its batch again
instead of paying for another. Replies go into the ledger of calls, as those of live calls do; a job
collected twice gives the same rows. Who asks for the replies removes the job: until then a call that
failed in it counts as failed, and is asked anew only when somebody asks again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime

from resources.judges.batch_endpoint import Endpoint
from resources.judges.batch_jobs import Job, forget, intend, jobs, parts
from resources.judges.call import Reply, Request, highest_usd, reply_of
from resources.judges.errors import BatchPendingError, BudgetExceededError, JudgeError
from resources.judges.ledger import Ledger
from resources.judges.ledger_records import CallRecord
from resources.judges.tally import Tally
from resources.store.storage import Storage
from textalign_dagster.progress import somebody_waits
from textalign_dagster.settings.judge import Judge

Progress = Callable[[int, int, str], None]


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
