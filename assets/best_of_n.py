"""Best-of-n of the base policy: its candidates ranked, and the scores of the best of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import polars as pl

from assets.stage import Stage
from assets.verdicts import Judging, scores_of
from resources.configured import SamplerResource
from textalign_dagster.experiment.evaluation import ranker
from textalign_dagster.ids import content_hash
from textalign_dagster.measures import best_of_n, statistics
from textalign_dagster.reports.score_table import score_row

NAME = "best of {n}"
"""The baseline's name in the scores."""


def ranked(
    stage: Stage, sampler: SamplerResource, candidates: pl.DataFrame, judging: Judging
) -> pl.DataFrame:
    """The candidates with ``rank_score``, higher is better; NULL where the ranker cannot score a text.

    Args:
        candidates: sample_id, prompt_id, prompt, reference, text, finish_reason, and any other columns.
    """
    columns = ("sample_id", "prompt_id", "prompt", "reference", "text", "finish_reason")
    scorer, shown = ranker(stage.experiment), candidates.select(columns)
    judge = "evaluation.best_of_n.judge"
    if judge in stage.experiment.evaluating_judges:
        found = judging.ask(judge, shown, "best of n").rows
    elif scorer is None:
        found = stage.experiment.task.feedback(shown, "reward")
    else:
        found = scores_of(stage, sampler, shown, scorer, "evaluation.best_of_n.scorer", "ranking")
    scores = found.select("sample_id", rank_score=pl.when(status="ok").then("value"))
    return candidates.join(scores, on="sample_id", how="left", maintain_order="left")


def best(candidates: pl.DataFrame, n: int) -> pl.DataFrame:
    """The best of each n candidates, as samples with their own ids."""
    found = best_of_n.chosen(candidates.rename({"rank_score": "score"}), n).drop("score")
    ids = [content_hash(NAME, n, sample_id) for sample_id in found["sample_id"]]
    return found.with_columns(sample_id=pl.Series(ids, dtype=pl.String))


def score_rows(
    candidates: pl.DataFrame, n: int, policy_hash: str, resamples: int
) -> Iterator[dict[str, Any]]:
    """Rows of SCORES computed from all candidates together; prompts with fewer than n scores do not count."""
    scored = candidates.drop_nulls("rank_score").group_by("prompt_id", maintain_order=True).agg("rank_score")
    enough = scored.filter(pl.col("rank_score").list.len() >= n)
    prompts, lists = enough["prompt_id"].to_list(), enough["rank_score"].to_list()
    name = NAME.format(n=n)
    for metric, estimate in best_of_n.ESTIMATES.items():
        found = statistics.mean([estimate(scores, n) for scores in lists], prompts, resamples=resamples)
        if found.value is not None:
            yield score_row(metric, found, policy_hash, subject=name, role="baseline")
    bound = statistics.Estimate(best_of_n.kl_bound(n), None, None, len(prompts), candidates.height)
    yield score_row("kl_bound", bound, policy_hash, subject=name, role="baseline")
