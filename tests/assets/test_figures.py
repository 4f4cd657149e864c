"""Metadata shown to people in the UI."""

from __future__ import annotations

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from assets.figures import figure, markdown_table, sample_blocks


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.123456, 0.1235), (31.26789, 31.27), (12345.678, 12346.0), (0.0, 0.0), (-0.000123456, -0.0001235)],
)
def test_figure_keeps_four_digits(value: float, shown: float) -> None:
    assert figure(value) == shown


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_figure_renders_non_finite_values_as_text(value: float) -> None:
    assert figure(value) == str(value)


def test_table_has_one_line_per_row() -> None:
    rows = {"text": ["a|b\nc", None, "x" * 200], "n": [1, 1234567, 3], "share": [0.5, 1234.5, None]}
    lines = markdown_table(pl.DataFrame(rows)).value.splitlines()
    assert lines[:2] == ["| text | n | share |", "| --- | --- | --- |"]
    assert lines[2:4] == ["| a\\|b c | 1 | 0.5 |", "|  | 1,234,567 | 1,234 |"]
    assert len(lines) == 5 and lines[4].startswith("| " + "x" * 59 + "… | 3 |")


def test_samples_are_shown_verbatim() -> None:
    block = sample_blocks([{"value": 0.5, "feedback": "E111 *x*", "prompt": "def f():", "text": "\n  pass"}])
    assert block.value == "**1**  value: 0.5 · feedback: E111 \\*x\\*\n\n```\ndef f():\n  pass\n```"


@given(st.text(alphabet="`\na ", max_size=40))
def test_no_text_can_close_its_fence(text: str) -> None:
    lines = sample_blocks([{"prompt": "", "text": text}]).value.splitlines()
    fence = lines[-1]
    assert set(fence) == {"`"} and lines.count(fence) == 2
    assert not any(fence in line for line in lines[3:-1])


def test_long_samples_are_truncated() -> None:
    shown = sample_blocks([{"prompt": "p" * 50, "text": "t" * 50}], width=10).value
    assert "p" * 10 + "…" + "t" * 10 + "…" in shown
