"""Obedience: does a policy follow its condition?

The rank correlation between the request (the label's rank among all labels) and the result (the task's
first measure), over all samples of an evaluation. 1: every better label yields a better sample; 0: the label
does not matter, however good the samples are.
"""

from __future__ import annotations

import polars as pl

from textalign_dagster.measures.bootstrap import RESAMPLES, Estimate
from textalign_dagster.measures.correlation import correlation
from textalign_dagster.methods.base import VARIED, Method
from textalign_dagster.tables import measure as measured
from textalign_dagster.tasks.base import Measure


def obedience(
    samples: pl.DataFrame, method: Method, measure: Measure, *, resamples: int = RESAMPLES
) -> Estimate:
    """Spearman's correlation of request and result, with an interval from resampling prompts.

    Args:
        samples: prompt_id, role, condition, measures (columns of EVALUATION_SAMPLES) of one policy.
        method: the one whose conditions they were sampled under; ``Method.sweep`` lists them, best first.
        measure: a sample's result is the numerator divided by the denominator, if there is one
            (``per_prompt`` is ignored), negated if lower is better. A ``steady`` measure is used as it is.

    Returns:
        In [-1, 1], positive for a policy that obeys. None if it is undefined: fewer than two conditions,
        results that are all equal, or no results. Unconditioned samples and samples without a result
        are ignored.
    """
    sweep = list(method.sweep)
    requested = pl.col("condition")
    if method.exemplar == VARIED:
        requested = pl.when(role="main").then(pl.lit(VARIED)).otherwise(requested)
    wish = [float(-place) for place in range(len(sweep))]
    result = pl.col("numerator")
    if measure.denominator is not None:
        result = pl.when(pl.col("denominator") != 0).then(result / pl.col("denominator"))
    compared = samples.select(
        "prompt_id",
        requested.replace_strict(sweep, wish, default=None, return_dtype=pl.Float64).alias("wish"),
        measured(measure.numerator).alias("numerator"),
        measured(measure.denominator or measure.numerator).alias("denominator"),
    ).with_columns(result=-result if measure.better == "lower" else result)
    compared = compared.drop_nulls(["wish", "result"])
    return correlation(
        compared["wish"].to_list(),
        compared["result"].to_list(),
        compared["prompt_id"].to_list(),
        "spearman",
        resamples=resamples,
    )
