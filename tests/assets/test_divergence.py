"""KL from a reference by hand, and how a policy reads the reference's texts."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from assets.divergence import estimated, pieces
from tests.textalign_dagster.experiment.test_corpus import experiment

TOKEN = "<|aligned|>"


def test_a_mean_over_texts() -> None:
    """Gaps of 1, 3 (prompt p) and 2 (prompt q) nats."""
    samples = pl.DataFrame({"sample_id": ["a", "b", "c"], "prompt_id": ["p", "p", "q"]})
    reference = pl.DataFrame({"sample_id": ["a", "b", "c"], "log_prob": [-1.0, -2.0, -4.0]})
    policy = pl.DataFrame({"sample_id": ["c", "b", "a"], "log_prob": [-6.0, -5.0, -2.0]})
    found = estimated(reference, policy, samples, 100)
    assert found.value == pytest.approx(2.0) and (found.n, found.rows) == (2, 3)


def test_a_control_token_before_each_line_but_the_first_which_goes_on_with_the_prompt(tmp_path: Path) -> None:
    method = {"name": "conditional", "tokens": "segment"}
    mine = experiment(tmp_path, method=method)
    found = list(pieces(mine, TOKEN, "def f():", "\n  a\n  b"))
    assert found == [
        (f"{TOKEN}def f():", "\n"),
        (f"{TOKEN}def f():\n{TOKEN}", "  a\n"),
        (f"{TOKEN}def f():\n{TOKEN}  a\n{TOKEN}", "  b"),
    ]
    # Without a condition, or with one a document, a text is read in one go.
    assert list(pieces(mine, None, "def f():", "\n  a\n")) == [("def f():", "\n  a\n")]
    plain = experiment(tmp_path, method={"name": "conditional"})
    assert list(pieces(plain, TOKEN, "def f():", "\n  a\n")) == [(f"{TOKEN}def f():", "\n  a\n")]
