"""A failed training run as Dagster shows it: one sentence, and the evidence for it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import dagster as dg

from resources.launchers.pipes_messages import Heard

TAIL = 2000  # bytes of a log that an error shows


def failure(
    reason: str,
    heard: Heard,
    log: Path | None,
    facts: Mapping[str, dg.MetadataValue],
    *,
    left: str = "",
    state: str = "",
    trust_heard: bool = True,
) -> dg.Failure:
    """A failure with the trainer's message if there is one, else with the reason.

    Args:
        reason: why it failed, a sentence without a full stop.
        log: the file with its output; None: it is in the step's own logs.
        facts: metadata of the place where it ran.
        left: a note on what the next run resumes from.
        state: how it ended according to the scheduler or cluster; added to the trainer's message.
        trust_heard: whether the trainer's message is about this end, and not from an earlier life.
    """
    metadata = dict(facts)
    if log is not None:
        metadata["log"] = dg.MetadataValue.path(str(log))
        metadata["end of log"] = dg.MetadataValue.md(f"```\n{end_of_log(log)}\n```")
    if heard.exception is not None and trust_heard:
        name, message = heard.exception
        metadata["exception"] = dg.MetadataValue.text(name)
        suffix = f" ({state})" if state else ""
        # Bad input fails again on a retry.
        return dg.Failure(
            f"{name}: {message}{suffix}{left}", metadata=metadata, allow_retries=name != "JobError"
        )
    where = "this step's stderr" if log is None else f"the log {log}"
    return dg.Failure(f"{reason}{left}; see {where}", metadata=metadata)


def end_of_log(log: Path, size: int = TAIL) -> str:
    """The last bytes of a log; empty if there is no log."""
    if not log.exists():
        return ""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - size))
        return stream.read().decode(errors="replace")
