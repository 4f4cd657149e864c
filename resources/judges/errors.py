"""Why a batch of judge calls did not finish. All replies so far are in the ledger: run again to resume."""

from __future__ import annotations

from collections.abc import Sequence


class JudgeError(Exception):
    """A batch of calls did not finish; the message says what to do."""


class JudgeStoppedError(JudgeError):
    """No further call can succeed until the problem that the message names is fixed."""


class BudgetExceededError(JudgeError):
    """The next call could exceed the budget; it was not sent."""


class BatchPendingError(JudgeError):
    """The calls are with the endpoint; it will reply within its completion window.

    ``jobs`` are the names of the jobs to wait for.
    """

    def __init__(self, message: str, jobs: Sequence[str]) -> None:
        super().__init__(message)
        self.jobs = tuple(jobs)
