"""Scores as rows, one per sample: the common output of all scorers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import polars as pl

from textalign_dagster.scorers import Scorer

SCORED = pl.Schema(
    {
        "sample_id": pl.String,
        "score": pl.Float64,  # in the scorer's own direction; NULL unless ok
        "value": pl.Float64,  # higher is better; NULL unless ok
        "text": pl.String,  # feedback in words, where there is any
        "label": pl.String,  # the category, where there is one
        "status": pl.String,
        "reason": pl.String,  # why not ok
    }
)

Report = Callable[..., None]
"""Called with (done, total)."""


class ScoringError(RuntimeError):
    """Scoring cannot be done; the message is one readable sentence (or two) with the remedy."""


def scored_rows(
    scorer: Scorer,
    samples: pl.DataFrame,
    outcomes: Sequence[tuple[float | None, str | None, str]],
    reason: str,
) -> pl.DataFrame:
    """One row per sample from its (score, reason if there is none, status if there is none)."""
    rows = []
    for score, why, status in outcomes:
        good = score is not None and math.isfinite(score)
        rows.append(
            {
                "score": score if good else None,
                "value": scorer.value(score) if good and score is not None else None,
                "status": "ok" if good else status if score is None else "failed",
                "reason": None if good else why or reason if score is None else f"the score is {score}",
            }
        )
    none = pl.lit(None, dtype=pl.String)
    frame = pl.DataFrame(rows, {name: SCORED[name] for name in ("score", "value", "status", "reason")})
    return ordered(frame.with_columns(sample_id=samples["sample_id"], text=none, label=none))


def ordered(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.select(pl.col(name).cast(kind) for name, kind in SCORED.items())
