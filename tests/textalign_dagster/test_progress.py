"""Progress: passed to a sink if there is one, logged otherwise, and plain text without a terminal."""

from __future__ import annotations

import io
import threading

import pytest
from rich.console import Console

from textalign_dagster import progress
from textalign_dagster.cli.console import ProgressLines
from textalign_dagster.progress import Finished, Step, announce, reporter, shown_by


def test_announce_without_a_sink() -> None:
    announce(Step("c", "s", 1, 2))  # nothing happens


def test_sink_receives_steps_from_all_threads() -> None:
    seen: list[Step | Finished] = []
    with shown_by(seen.append):
        report = reporter("toy|001", "generations", log=pytest.fail)
        report(1, 2, "fast")
        thread = threading.Thread(target=report, args=(2, 2))
        thread.start()
        thread.join()
    announce(Step("c", "s", 1, 2))
    assert seen == [Step("toy|001", "generations", 1, 2, "fast"), Step("toy|001", "generations", 2, 2)]


def test_previous_sink_is_restored_even_after_an_error() -> None:
    outer: list[object] = []
    inner: list[object] = []
    with shown_by(outer.append):
        with pytest.raises(ZeroDivisionError), shown_by(inner.append):
            announce(Finished("c", "s", "done", False))
            raise ZeroDivisionError
        announce(Finished("c", "s", "again", True))
    assert (len(outer), len(inner)) == (1, 1)


def test_progress_is_logged_periodically_without_a_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 6.0, 7.0, 12.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    logged: list[str] = []
    report = reporter("toy|001", "generations", logged.append)
    for done, note in ((1, ""), (500, "loss 1"), (600, ""), (1000, ""), (2000, "")):
        report(done, 2000, note)
    assert logged == [
        "generations: 500 of 2,000, about 18 s left, loss 1",
        "generations: 1,000 of 2,000, about 12 s left",
    ]


def lines(terminal: bool, *events: Step | Finished) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100)
    with ProgressLines(console) as shown:
        for event in events:
            shown.show(event)
    return out.getvalue()


def test_one_line_for_each_finished_stage() -> None:
    output = lines(
        False,
        Step("a|001", "x", 1, 2),
        Finished("a|001", "x", "[12] rows", False),
        Finished("a|001", "y", "h", True),
    )
    assert [line.split() for line in output.splitlines()] == [
        ["a|001", "x", "0.0", "s", "[12]", "rows"],
        ["a|001", "y", "reused", "h"],
    ]


def test_no_control_characters_without_a_terminal() -> None:
    assert "\x1b" not in lines(False, Step("a|001", "x", 1, 2), Finished("a|001", "x", "h", False))
    assert "\x1b" in lines(
        True, Step("a|001", "x", 1, 2), Step("a|001", "y", 1, 1), Finished("a|001", "y", "h", False)
    )
