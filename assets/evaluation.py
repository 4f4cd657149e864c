"""The sixth stage: what the checkpoint does on prompts no iteration trains on."""

from collections.abc import Sequence
from typing import Any

import dagster as dg
import polars as pl

from assets.checkpoint import checkpoint
from assets.columns import columns_of
from assets.figures import markdown_table, sample_blocks
from assets.measuring import Measuring, Seconds
from assets.score_tables import write
from assets.stage import LOOP, Stage
from assets.subjects import Subject
from assets.verdicts import sent_again
from resources.configured import SamplerResource, StoreResource
from resources.rewards import trained
from resources.store import Artifact, Draft
from textalign_dagster.experiment.evaluation import (
    evaluation_scorer,
    evaluation_source,
    further_prompts,
    ranker,
)
from textalign_dagster.loop import checks
from textalign_dagster.loop.stages import stage_settings
from textalign_dagster.reports.report import placed, score_rows
from textalign_dagster.reports.score_table import reported, titles, value_of
from textalign_dagster.tables import SCORES, measure


@dg.asset(
    **LOOP,
    deps=[checkpoint],
    pool="gpu",
    kinds={"huggingface", "parquet"},
    check_specs=checks.specs("evaluation"),
    metadata=columns_of(SCORES),
)
def evaluation(
    context: dg.AssetExecutionContext, store: StoreResource, sampler: SamplerResource
) -> dg.MaterializeResult:
    """One row per metric and condition, with a 95 % interval; per-sample rows alongside.

    The checkpoint is conditioned on the exemplar feedback, and on other feedback, too (does it obey?).
    With the first iteration, the unmodified base policy is evaluated as iteration 0, together with the
    baselines.
    """
    with Stage.of(context, store.open()) as stage:
        stage.require("checkpoint")
        measuring = Measuring(stage, sampler)
        if stage.cell.iteration == 1:
            base = evaluate(
                stage, measuring, 0, also=[measuring.subjects.trained(1), *measuring.subjects.scenarios(1)]
            )
            stage.store.assign(
                stage.cell.experiment, 0, stage.name, base,
                settings=stage_settings(stage.experiment, stage.name, 0), checks={},
            )  # fmt: skip
        made = evaluate(stage, measuring, stage.cell.iteration)
        start = stage.require("evaluation", 0)
        scores, at_start = made.frame("scores"), start.frame("scores")
        named = titles(stage.experiment)
        first = next(metric for metric in named if metric in set(scores["metric"]))
        main = scores.filter(pl.col("role") == "main")
        figures = {named[metric]: value for metric, value in main.select("metric", "value").iter_rows()}
        probes = scores.filter((pl.col("role") == "probe") & (pl.col("metric") == first))
        return stage.publish(
            made,
            headline=f"{named[first]} {_formatted(at_start, first)} at the start, now {_formatted(scores, first)}",
            rows=scores.height,
            checks=[
                checks.schema(scores, SCORES, ["policy_hash", "subject", "metric", "condition"]),
                checks.diversity(
                    value_of(scores, "distinct_3"),
                    value_of(at_start, "distinct_3"),
                    stage.experiment.checks.min_diversity,
                ),
            ],
            metadata={
                **figures,
                **{f"{named[first]}, probe {i}": value for i, value in enumerate(probes["value"], start=1)},
                **_work(made),
                **_baselines(at_start),
                "curve": _curve(stage, scores),
                "scores": markdown_table(scores.drop("policy_hash")),
                "examples": sample_blocks(_examples(stage, made.frame("evaluation_samples"))),
            },
        )


def evaluate(stage: Stage, measuring: Measuring, iteration: int, *, also: Sequence[Subject] = ()) -> Artifact:
    """Scores and samples of the policy that an iteration trained (0: the base policy and the baselines).

    Args:
        also: subjects to sample in the same pass, so that no model is loaded twice.
    """
    own, base = measuring.subjects.trained(iteration), stage.policy(1)
    subjects = [own, *(measuring.subjects.baselines if iteration == 0 else ())]
    candidates = measuring.subjects.candidates if iteration == 0 else None
    scenarios = measuring.subjects.scenarios(iteration)

    def produce(draft: Draft) -> None:
        seconds = Seconds()
        # The base policy last: usually it is the fluency model, too.
        first = [] if candidates is None else [candidates]
        measuring.prepare([*also, *first, *reversed(subjects), *scenarios], seconds)
        write(measuring, draft, subjects, seconds, candidates, scenarios)

    inputs = {"trained_policy": own.policy_hash, "base_policy": base.policy_hash, **own.inputs}
    inputs |= trained.inputs(evaluation_scorer(stage.experiment), stage.store)
    if candidates is not None:  # a judge has no such inputs
        inputs |= trained.inputs(ranker(stage.experiment), stage.store)
    inputs |= further_prompts(stage.experiment)
    source = evaluation_source(measuring.prompts)
    again = sent_again(stage, iteration) if stage.experiment.evaluating_judges else {}
    return stage.make({**inputs, "prompts": source}, produce, iteration=iteration, **again)


def _work(made: Artifact) -> dict[str, Any]:
    """Its cost, and the number of unscored samples."""
    facts = made.manifest["facts"]
    return {name: facts[name] for name in ("unscored", "calls", "usd") if facts.get(name) is not None}


def _baselines(at_start: pl.DataFrame) -> dict[str, Any]:
    rows = at_start.filter(role="baseline").drop("policy_hash", "condition", "role")
    return {} if rows.is_empty() else {"baselines": markdown_table(rows)}


def _curve(stage: Stage, scores: pl.DataFrame) -> dg.MarkdownMetadataValue:
    """The first measure over the iterations so far, alongside that of the null control."""
    from textalign_dagster.reports.curves import as_markdown, curves

    name, now = stage.cell
    before = score_rows(stage.store, stage.experiments, name)
    earlier = before.filter((pl.col("experiment") != name) | (pl.col("iteration") < now))
    rows = pl.concat([earlier, placed(scores, name, now)])
    return dg.MetadataValue.md(as_markdown(curves(rows, stage.experiment, name, panels=1)))


def _examples(stage: Stage, samples: pl.DataFrame, show: int = 3) -> list[dict[str, Any]]:
    """Some samples of every condition, with what the first measure counts in them."""
    counted = reported(stage.experiment)[0].numerator
    shown = samples.group_by("role", "condition", maintain_order=True).head(show)
    asked = pl.col("condition").alias("conditioned on")
    return shown.select(asked, measure(counted), "prompt", "text").to_dicts()


def _formatted(scores: pl.DataFrame, metric: str) -> str:
    value = value_of(scores, metric)
    return "-" if value is None else f"{value:.3g}"
