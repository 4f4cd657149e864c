"""KL divergence from a reference, computed by hand, and how a policy scores the reference's texts."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from assets.divergence import estimated, pieces
from tests.textalign_dagster.experiment.test_corpus import experiment

TOKEN = "<|aligned|>"


def test_divergence_is_averaged_over_texts() -> None:
    """Gaps of 1, 3 (prompt p) and 2 (prompt q) nats."""
    samples = pl.DataFrame({"sample_id": ["a", "b", "c"], "prompt_id": ["p", "p", "q"]})
    reference = pl.DataFrame({"sample_id": ["a", "b", "c"], "log_prob": [-1.0, -2.0, -4.0]})
    policy = pl.DataFrame({"sample_id": ["c", "b", "a"], "log_prob": [-6.0, -5.0, -2.0]})
    result = estimated(reference, policy, samples, 100)
    assert result.value == pytest.approx(2.0) and (result.n, result.rows) == (2, 3)


def test_segment_tokens_precede_every_line_except_the_first(tmp_path: Path) -> None:
    method = {"name": "conditional", "tokens": "segment"}
    by_segment = experiment(tmp_path, method=method)
    segments = list(pieces(by_segment, TOKEN, "def f():", "\n  a\n  b"))
    assert segments == [
        (f"{TOKEN}def f():", "\n"),
        (f"{TOKEN}def f():\n{TOKEN}", "  a\n"),
        (f"{TOKEN}def f():\n{TOKEN}  a\n{TOKEN}", "  b"),
    ]
    # Without a condition, or with one per document, a text is scored in one piece.
    assert list(pieces(by_segment, None, "def f():", "\n  a\n")) == [("def f():", "\n  a\n")]
    by_document = experiment(tmp_path, method={"name": "conditional"})
    assert list(pieces(by_document, TOKEN, "def f():", "\n  a\n")) == [(f"{TOKEN}def f():", "\n  a\n")]
