"""Obedience, computed by hand."""

from __future__ import annotations

import math

import polars as pl
import pytest

from textalign_dagster.methods import AltLMU, AltRM, Method, NoFeedback
from textalign_dagster.reports.obedience import obedience
from textalign_dagster.tables import measures
from textalign_dagster.tasks.base import Measure

RATE = Measure("violations", "per 1,000", "violations", "characters", 1000, "lower")
METHOD = AltRM(phrases=("good", "fair", "bad"))


def samples(
    rows: list[tuple[str, str | None, float | None, float]], main: str | None = "good"
) -> pl.DataFrame:
    """Rows of (prompt, condition, violations, characters)."""
    return pl.DataFrame(
        {
            "prompt_id": [row[0] for row in rows],
            "condition": [row[1] for row in rows],
            "role": ["main" if row[1] == main else "probe" for row in rows],
        },
        schema_overrides={"condition": pl.String},
    ).with_columns(measures({"violations": row[2], "characters": row[3]} for row in rows))


OBEYED = [
    ("p", "good", 0, 100),
    ("p", "fair", 5, 100),
    ("p", "bad", 9, 100),
    ("q", "good", 1, 100),
    ("q", "fair", 6, 100),
    ("q", "bad", 10, 100),
]


def test_obedience_by_hand() -> None:
    # Requests 0, -1, -2 twice: ranks 5.5, 3.5, 1.5, …; results 0, -.05, -.09, -.01, -.06, -.1: ranks
    # 6, 4, 2, 5, 3, 1. Centred: (2, 0, -2, 2, 0, -2) and (2.5, .5, -1.5, 1.5, -.5, -2.5).
    expected = (2 * 2.5 + 2 * 1.5 + 2 * 1.5 + 2 * 2.5) / math.sqrt(16 * 17.5)
    result = obedience(samples(OBEYED), METHOD, RATE)
    assert result.value == pytest.approx(expected) == pytest.approx(0.9561828874675149)
    assert (result.n, result.rows) == (2, 6)
    assert result.lo is not None and result.hi is not None and result.lo <= result.value <= result.hi


def test_obedience_uses_the_rate_rather_than_the_count() -> None:
    # Equally many violations in ever longer texts: worse requests produced better samples.
    rows = [("p", "good", 4, 100), ("p", "fair", 4, 200), ("p", "bad", 4, 400)]
    assert obedience(samples(rows), METHOD, RATE).value == pytest.approx(-1.0)
    higher = Measure("clean", "clean", "violations", better="higher")
    rows = [("p", "good", 3, 1), ("p", "fair", 2, 1), ("p", "bad", 1, 1)]
    assert obedience(samples(rows), METHOD, higher).value == pytest.approx(1.0)


def test_samples_without_a_request_or_a_result_do_not_count() -> None:
    extra = [("r", None, 50, 100), ("r", "bad", 3, 0), ("r", "good", None, 10), ("r", "unheard of", 1, 10)]
    with_extra, without = (obedience(samples(rows), METHOD, RATE) for rows in (OBEYED + extra, OBEYED))
    assert with_extra == without


def test_obedience_requires_two_different_requests_and_results() -> None:
    only_main = [row for row in OBEYED if row[1] == "good"]
    alike = [(prompt, condition, 1.0, 100.0) for prompt, condition, *_ in OBEYED]
    unconditioned = [(prompt, None, a, b) for prompt, _, a, b in OBEYED]
    never = AltRM.model_validate({"phrases": ["good", "fair", "bad"], "exemplar": "none"})
    for rows, method in (
        (only_main, METHOD),
        (alike, METHOD),
        (unconditioned, NoFeedback()),
        (OBEYED, never),
    ):
        assert obedience(samples(rows), method, RATE).value is None
    assert obedience(samples(OBEYED[:0]), METHOD, RATE).value is None


@pytest.mark.parametrize("exemplar", ["static", "varied"])
def test_alt_lmu_ranks_its_main_samples_first_whatever_their_condition(exemplar: str) -> None:
    method: Method = AltLMU.model_validate(
        {"exemplar": exemplar, "ask_for": "well done", "probe": ["so so", "awful"]}
    )
    conditions = {"good": "well done", "fair": "so so", "bad": "awful"}
    rows = samples([(prompt, conditions[old], a, b) for prompt, old, a, b in OBEYED], main="well done")
    if exemplar == "varied":  # then each main sample has its own condition
        own = pl.when(role="main").then(pl.lit("praise of ") + pl.col("prompt_id"))
        rows = rows.with_columns(condition=own.otherwise("condition"))
    assert obedience(rows, method, RATE).value == pytest.approx(0.9561828874675149)
