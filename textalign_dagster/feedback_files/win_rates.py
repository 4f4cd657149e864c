"""Win rates of a model against a reference, by ratings and by rankings (Bansal et al. 2023, arXiv:2308.15812).

By ratings, each model's answers are rated separately and the higher rating wins; by rankings, a judge compared the two
answers. A win counts 1, a tie 1/2.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import numpy.typing as npt
import polars as pl

from textalign_dagster.feedback_files.imported import Imported
from textalign_dagster.measures.bootstrap import (
    RESAMPLES,
    Difference,
    Estimate,
    Floats,
    bootstrap_interval,
    difference,
    mean,
    mean_sums,
)

OUTCOMES = pl.Schema(
    {
        "prompt_id": pl.String,  # key
        "outcome": pl.Float64,  # 1: the model won, 0.5: a tie, 0: the reference won; or the probability that the model wins
        "longer_by": pl.Float64,  # length of the model's answer minus the reference's, in characters
    }
)
NORMAL_975, NORMAL_80 = 1.959964, 0.841621
"""Quantiles of the standard normal distribution: for a two-sided test at 5 %, and for a power of 80 %."""
_NEWTON_STEPS = 30
_PENALTY = 1e-3  # on the coefficients, so that they stay finite where lengths separate wins from losses


@dataclass(frozen=True)
class Outcomes:
    """A model against a reference, item by item.

    Attributes:
        rows: schema :data:`OUTCOMES`.
        items: number of prompts in either file.
        unusable: number of unparseable or failed judgements in both files.
    """

    rows: pl.DataFrame
    items: int
    unusable: int


@dataclass(frozen=True)
class WinRate:
    """The win rate and related figures of some outcomes.

    Attributes:
        win_rate: mean outcome, with an interval from resampled prompts.
        wins, ties, losses: shares of outcomes above, at and below 0.5.
        length_controlled: the win rate at equal length, see :func:`length_controlled`.
        detectable: the smallest distance from 0.5 that this many items detect with 80 % power at the 5 % level
            (two-sided); None without an interval.
        items, counted, unusable: see :class:`Outcomes`; ``counted`` is the number of prompts with an outcome.
    """

    win_rate: Estimate
    wins: float | None
    ties: float | None
    losses: float | None
    length_controlled: Estimate
    detectable: float | None
    items: int
    counted: int
    unusable: int


def by_ratings(model: Imported, reference: Imported) -> Outcomes:
    """The outcomes on prompts where both have a usable rating; of several answers, the first counts."""
    sides = [_rated(found) for found in (model, reference)]
    joined = sides[0].join(sides[1], on="prompt_id", suffix="_reference", maintain_order="left")
    gap = pl.col("value") - pl.col("value_reference")
    rows = joined.select(
        "prompt_id",
        outcome=(gap.sign() + 1) / 2,
        longer_by=(pl.col("length") - pl.col("length_reference")).cast(pl.Float64),
    )
    return _outcomes(rows, [model, reference], sum(_unusable(found.feedback) for found in (model, reference)))


def by_rankings(found: Imported) -> Outcomes:
    """The outcomes of pairs whose first answer is the reference's and whose second is the model's.

    Two identical texts, which the readers refuse, count as a tie. Of several pairs for a prompt, the first counts.
    """
    lengths = found.samples.select("sample_id", length=pl.col("text").str.len_chars())
    gap = pl.col("length") - pl.col("length_reference")
    decided = (
        found.pairs_as_read.filter(status="ok")
        .join(lengths.rename({"sample_id": "sample_b"}), on="sample_b", maintain_order="left")
        .join(
            lengths.rename({"sample_id": "sample_a", "length": "length_reference"}),
            on="sample_a",
            maintain_order="left",
        )
        .select(
            "prompt_id",
            outcome=pl.col("winner").replace_strict(
                {"b": 1.0, "tie": 0.5, "a": 0.0}, return_dtype=pl.Float64
            ),
            longer_by=gap.cast(pl.Float64),
        )
    )
    ties = pl.DataFrame([(prompt, 0.5, 0.0) for _, prompt, _ in found.identical], OUTCOMES, orient="row")
    rows = pl.concat([decided, ties]).unique("prompt_id", keep="first", maintain_order=True)
    return _outcomes(rows, [found], _unusable(found.pairs))


def win_rate(outcomes: Outcomes, *, resamples: int = RESAMPLES) -> WinRate:
    """Win rate, shares, the length-controlled win rate, and the smallest detectable effect."""
    rows = outcomes.rows
    overall = mean(rows["outcome"].to_list(), rows["prompt_id"].to_list(), resamples=resamples)
    sides = (rows["outcome"] > 0.5, rows["outcome"] == 0.5, rows["outcome"] < 0.5)
    shares = [side.mean() for side in sides]
    wins, ties, losses = (None if share is None else float(share) for share in shares)  # type: ignore[arg-type]
    detectable = None
    if overall.lo is not None and overall.hi is not None:
        error = (overall.hi - overall.lo) / (2 * NORMAL_975)
        detectable = (NORMAL_975 + NORMAL_80) * error
    return WinRate(
        overall, wins, ties, losses, length_controlled(rows, resamples=resamples), detectable,
        outcomes.items, rows.height, outcomes.unusable,
    )  # fmt: skip


def paired_differences(
    found: Mapping[tuple[str, str], Outcomes], *, resamples: int = RESAMPLES
) -> list[tuple[str, str, Difference]]:
    """Win rates compared on shared items: two models under one protocol, or one model under both.

    Args:
        found: (model, protocol) → its outcomes.

    Returns:
        The names of both sides, and the difference with an interval from resampled prompts.
    """
    sums = {
        key: mean_sums(one.rows["outcome"].to_list(), one.rows["prompt_id"].to_list())
        for key, one in found.items()
    }
    return [
        (
            ", by ".join(first),
            ", by ".join(second),
            difference(sums[first], sums[second], resamples=resamples),
        )
        for first, second in combinations(sums, 2)
        if (first[0] == second[0]) != (first[1] == second[1])
    ]


def length_controlled(rows: pl.DataFrame, *, resamples: int = RESAMPLES) -> Estimate:
    """The win rate that a logistic regression predicts for answers as long as the reference's.

    P(win) = σ(θ + φ·tanh(d/s)), d the difference in length (characters) and s its standard deviation; the estimate is σ(θ).
    These are AlpacaEval's model and length terms (Dubois et al. 2024, arXiv:2404.04475), without its term for
    instruction difficulty, which needs many models. None with fewer than two items.
    """
    n = rows.height
    outcome, longer = rows["outcome"].to_numpy(), rows["longer_by"].to_numpy()
    spread = float(np.std(longer)) if n else 0.0
    if n < 2:
        return Estimate(None, None, None, n, n)
    term = np.tanh(longer / spread) if spread > 0 else np.zeros(n)

    def statistic(take: npt.NDArray[np.int64]) -> Floats:
        return _sigmoid(_fitted(term[take], outcome[take])[..., 0])

    value, lo, hi = bootstrap_interval(statistic, n, resamples)
    return Estimate(value, lo, hi, n, n)


def _fitted(term: Floats, outcome: Floats) -> Floats:
    """θ and φ for each row, [..., n] -> [..., 2], by Newton's method."""
    design = np.stack([np.ones_like(term), term], -1)
    coefficients = np.zeros((*term.shape[:-1], 2))
    for _ in range(_NEWTON_STEPS):
        p = _sigmoid(np.einsum("...ni,...i->...n", design, coefficients))
        gradient = np.einsum("...ni,...n->...i", design, outcome - p) - _PENALTY * coefficients
        curvature = np.einsum("...ni,...n,...nj->...ij", design, p * (1 - p), design) + _PENALTY * np.eye(2)
        step = np.linalg.solve(curvature, gradient[..., None])[..., 0]
        # Steps are capped at 5: where probabilities are near 0 and 1, the curvature is uninformative.
        coefficients = coefficients + step / np.maximum(1.0, np.abs(step).max(-1, keepdims=True) / 5)
        if np.abs(step).max() < 1e-9:
            break
    return coefficients


def _sigmoid(x: Floats) -> Floats:
    return np.asarray(0.5 * (1 + np.tanh(x / 2)))


def _rated(found: Imported) -> pl.DataFrame:
    """prompt_id, value and length of each prompt's first rated answer."""
    usable = found.feedback.filter(status="ok").select("sample_id", "value").drop_nulls("value")
    return (
        found.samples.join(usable, on="sample_id", maintain_order="left")
        .unique("prompt_id", keep="first", maintain_order=True)
        .select("prompt_id", "value", length=pl.col("text").str.len_chars().cast(pl.Int64))
    )


def _unusable(judgements: pl.DataFrame) -> int:
    return judgements.filter(pl.col("status").is_in(["unparseable", "failed"])).height


def _outcomes(rows: pl.DataFrame, files: list[Imported], unusable: int) -> Outcomes:
    items = {prompt for found in files for prompt in found.samples["prompt_id"]}
    items |= {prompt for found in files for _, prompt, _ in found.identical}
    return Outcomes(pl.DataFrame(rows, OUTCOMES), len(items), unusable)


def rate_text(found: WinRate) -> str:
    """The win rate and related figures in one line."""
    return (
        f"{percent(found.win_rate.value)} %{_interval(found.win_rate)}; wins {percent(found.wins)}, ties "
        f"{percent(found.ties)}, losses {percent(found.losses)}; length-controlled "
        f"{percent(found.length_controlled.value)}{_interval(found.length_controlled)}; detectable from 50: "
        f"{percent(found.detectable)}; {found.counted:,} of {found.items:,} items, {found.unusable:,} unusable"
    )


def difference_text(first: str, second: str, found: Difference) -> str:
    """The difference in one line."""
    items = f"{found.n:,} shared items"
    if found.value is None:
        return f"{first} - {second}: undefined, {items}"
    return f"{first} - {second}: {100 * found.value:+.1f} points{_interval(found)}, {items}"


def percent(value: float | None) -> str:
    """A share as a percentage; "-" where undefined."""
    return "-" if value is None or math.isnan(value) else f"{100 * value:.1f}"


def _interval(of: Estimate) -> str:
    return "" if of.lo is None or of.hi is None else f" ({100 * of.lo:.1f} to {100 * of.hi:.1f})"
