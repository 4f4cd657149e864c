"""A judge's reply, and the verdict read from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "unparseable", "failed", "skipped"]


@dataclass(frozen=True)
class Reply:
    """One response from an endpoint, unparsed.

    Attributes:
        text: the message's content; None: it has none.
        refusal: the endpoint's own field for a refusal.
        finish_reason: "stop", "length", "content_filter", …
        error: why there is no answer (the call failed permanently).
    """

    text: str | None
    refusal: str | None = None
    finish_reason: str | None = None
    error: str | None = None


@dataclass(frozen=True)
class Verdict:
    """A judgement. Only ``ok`` carries one; every other status carries the reason instead.

    Attributes:
        value: the number (ask ``text``, ``rating``).
        label: the category; "perfect" or "flawed" (``judgment``); "a" or "b", the response shown
            first or second (``ranking``, ``win``).
        text: the feedback or critique in words.
        analysis: what the judge wrote before its verdict; kept for readers, never trained on.
    """

    status: Status
    value: float | None = None
    label: str | None = None
    text: str | None = None
    analysis: str | None = None
    reason: str | None = None

    def __post_init__(self) -> None:
        carries = (self.value, self.label, self.text) != (None, None, None)
        if self.status == "ok" and (self.reason is not None or not carries):
            raise ValueError(f"an ok verdict carries a judgement and no reason: {self}")
        if self.status != "ok" and (carries or self.analysis is not None or not self.reason):
            raise ValueError(f"a verdict that is not ok carries a reason and nothing else: {self}")


def unparseable(reason: str) -> Verdict:
    """The judge answered, but the answer cannot be used."""
    return Verdict("unparseable", reason=reason)


def failed(reason: str) -> Verdict:
    """The judge gave no answer: an error or a refusal."""
    return Verdict("failed", reason=reason)


def skipped(reason: str) -> Verdict:
    """The judge was not asked."""
    return Verdict("skipped", reason=reason)
