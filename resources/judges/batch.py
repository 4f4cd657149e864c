"""Judging through the Batch API: half the price, replies within a day, safe to interrupt.

A batch is stored as a job (`batch_jobs`), so that any later process can resume it: ``intended`` → ``open`` →
``collected``. The job is stored before anything is sent, and its name is in the batch's metadata, so a process
killed after sending and before storing the batch's id finds its batch again instead of paying for another.
Replies go into the ledger like those of live calls; collecting a job twice gives the same rows. A call that
fails in a batch is given up: ``failed`` in the ledger, and sent again only on request.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from datetime import datetime

from resources.judges.batch_jobs import Endpoint, Job, forget, intend, jobs, parts
from resources.judges.call import Progress, Reply, Request, Tally, reply_of
from resources.judges.errors import BatchPendingError, BudgetExceededError, JudgeError
from resources.judges.forecast import highest_usd
from resources.judges.ledger import Ledger
from resources.store.storage import Storage
from textalign_dagster.progress import somebody_waits
from textalign_dagster.settings.judge import Judge


def batch_replies(
    missing: Sequence[Request],
    judge: Judge,
    ledger: Ledger,
    *,
    scope: str,
    spent: float,
    tally: Tally,
    progress: Progress,
    retry_before: datetime | None = None,
) -> dict[str, Reply]:
    """The replies to requests that have no outcome in the ledger, by key.

    Sends requests that are not in any job yet. Polls until all batches have ended, if a user is waiting.

    Args:
        scope: a hash of all calls of the stage.
        spent: USD of the scope so far, for the budget.
        retry_before: collected jobs that were created before this time are ignored.

    Raises:
        BatchPendingError: batches are in progress, and no user is waiting.
        BudgetExceededError: the new requests could exceed the budget; nothing is sent.
        JudgeStoppedError: the key is missing, or the endpoint refuses the batch.
    """
    assert judge.batch is not None
    storage = ledger.storage
    wanted = {request.key: request for request in missing}
    known = jobs(storage)
    for job in known:
        if job.scope == scope and job.state == "collected" and (not wanted or _is_before(job, retry_before)):
            forget(storage, job)
    if not wanted:
        return {}
    endpoint = Endpoint(judge)
    mine = [
        job
        for job in known
        if wanted.keys() & {row.call_key for row in job.asked}
        and not (job.state == "collected" and _is_before(job, retry_before))
    ]
    taken = {row.call_key for job in mine for row in job.asked}
    new = [request for key, request in wanted.items() if key not in taken]
    if new:
        highest = sum(highest_usd(request, judge) for request in new) * judge.batch.price_factor
        if judge.budget_usd is not None and spent + highest > judge.budget_usd:
            raise BudgetExceededError(
                f"a batch of {len(new):,} calls could cost ${highest:.2f}, with ${spent:.2f} spent already; "
                f"budget_usd is {judge.budget_usd:g}: raise it, or judge fewer samples"
            )
        mine += [intend(storage, judge, part, scope) for part in parts(new, judge)]
    mine = [
        endpoint.submit(storage, job) if job.state == "intended" and job.scope == scope else job
        for job in mine
    ]
    pause = threading.Event()
    while True:
        mine = [endpoint.collect(ledger, job) for job in mine]
        left = [job for job in mine if job.state != "collected"]
        done = tally.total - len(wanted) + sum(_answered(job, wanted) for job in mine)
        progress(done, tally.total, f"{len(left)} of {len(mine)} batches in progress")
        if not left:
            break
        if not somebody_waits():
            ids = ", ".join(job.id or job.name for job in left)
            raise BatchPendingError(
                f"{sum(len(job.asked) for job in left):,} calls are with the Batch API of {judge.endpoint} ({ids}); "
                "the sensor `collect_batches` fetches the replies and resumes, as does running this again",
                [job.name for job in left],
            )
        pause.wait(judge.batch.poll_s)
    ledger.flush()
    replies = {key: reply_of(row, from_ledger=False) for key, row in ledger.outcomes(wanted).items()}
    for job in mine:
        if job.scope == scope:
            forget(storage, job)
    for reply in replies.values():
        tally.received += reply.status == "ok"
        tally.failed += reply.status != "ok"
        tally.usd += reply.usd or 0.0
        tally.requests += 1
    return replies


def calls_in_progress(storage: Storage) -> set[str]:
    """The keys of calls whose batch has not been collected yet."""
    return {row.call_key for job in jobs(storage) if job.state != "collected" for row in job.asked}


def _answered(job: Job, wanted: Mapping[str, Request]) -> int:
    if job.state != "collected":
        return min(job.answered, len(job.asked))
    return sum(row.call_key in wanted for row in job.asked)


def _is_before(job: Job, time: datetime | None) -> bool:
    return time is not None and datetime.fromisoformat(job.created_at) < time


def collect_all(ledger: Ledger) -> tuple[list[Job], list[str]]:
    """Fetches the replies that are ready, for all experiments; sends no calls.

    Returns:
        All jobs in their current state, and an error message for each one that could not be checked.
    """
    found, problems = [], []
    for job in jobs(ledger.storage):
        try:
            found.append(Endpoint(job.settings).collect(ledger, job))
        except JudgeError as error:
            problems.append(f"{job.name}: {error}")
            found.append(job)
    return found, problems
