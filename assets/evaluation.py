"""The sixth stage: what the checkpoint does on prompts no iteration trains on."""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import dagster as dg
import polars as pl

from assets.checkpoint import checkpoint
from assets.columns import columns_of
from assets.figures import markdown_table, sample_blocks
from assets.stage import LOOP, Stage
from resources.configured import SamplerResource, StoreResource
from resources.sampler import Decoding, Request
from resources.store import Artifact, Draft
from textalign_dagster import checks
from textalign_dagster.conditioning import render
from textalign_dagster.evaluation import (
    conditions,
    evaluation_prompts,
    evaluation_source,
    score_table,
    titles,
    value_of,
)
from textalign_dagster.ids import content_hash
from textalign_dagster.report import placed, score_rows
from textalign_dagster.stages import stage_settings
from textalign_dagster.tables import EVALUATION_SAMPLES, SCORES, measure, measures


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
    """One row per metric and condition, with a 95 % interval; per-sample rows beside it.

    The checkpoint is asked for the exemplar feedback, and for other feedback too (does it obey?).
    With the first iteration, the untouched base policy is evaluated as iteration 0.
    """
    with Stage.of(context, store.open()) as stage:
        stage.require("checkpoint")
        if stage.cell.iteration == 1:
            base = evaluate(stage, sampler, 0)
            stage.store.assign(
                stage.cell.experiment, 0, stage.name, base,
                settings=stage_settings(stage.experiment, stage.name, 0), checks={},
            )  # fmt: skip
        made = evaluate(stage, sampler, stage.cell.iteration)
        start = stage.require("evaluation", 0)
        scores, at_start = made.frame("scores"), start.frame("scores")
        named = titles(stage.experiment.task.measures)
        first = next(iter(named))
        main = scores.filter(pl.col("role") == "main")
        figures = {named[metric]: value for metric, value in main.select("metric", "value").iter_rows()}
        probes = scores.filter((pl.col("role") == "probe") & (pl.col("metric") == first))
        return stage.publish(
            made,
            headline=f"{named[first]} {_told(at_start, first)} at the start, now {_told(scores, first)}",
            rows=scores.height,
            checks=[
                checks.schema(scores, SCORES, ["policy_hash", "metric", "condition"]),
                checks.diversity(
                    value_of(scores, "distinct_3"),
                    value_of(at_start, "distinct_3"),
                    stage.experiment.checks.min_diversity,
                ),
            ],
            metadata={
                **figures,
                **{f"{named[first]}, probe {i}": value for i, value in enumerate(probes["value"], start=1)},
                "curve": _curve(stage, scores),
                "scores": markdown_table(scores.drop("policy_hash")),
                "examples": sample_blocks(_examples(stage, made.frame("evaluation_samples"))),
            },
        )


def evaluate(stage: Stage, sampler: SamplerResource, iteration: int) -> Artifact:
    """Scores and samples of the policy that an iteration trained (0: the base policy)."""
    experiment, settings = stage.experiment, stage.experiment.evaluation
    model, base = stage.policy(iteration + 1), stage.policy(1)
    prompts = evaluation_prompts(experiment)
    engine = sampler.of(experiment)
    decoding = Decoding(
        temperature=settings.temperature,
        top_p=settings.top_p,
        max_new_tokens=experiment.sampling.max_new_tokens,
        min_new_tokens=experiment.sampling.min_new_tokens,
        ignore_eos=experiment.sampling.ignore_eos,
        banned_tokens=experiment.method.special_tokens if iteration else (),
    )

    def produce(draft: Draft) -> None:
        started, report = time.monotonic(), stage.report()
        asked = conditions(experiment, iteration)
        rows = []
        for index, ask in enumerate(asked):
            requests = [
                Request(render(experiment.method.template, ask.condition, prompt), tuple(seeds))
                for prompt, seeds in prompts.select("prompt", "seeds").iter_rows()
            ]
            completions = engine.generate(
                model.path, requests, decoding, partial(_share, report, index, len(asked))
            )
            rows += [
                {
                    "policy_hash": model.policy_hash,
                    "sample_id": content_hash(
                        "evaluation", prompt["prompt_id"], model.policy_hash, vars(decoding), vars(ask), seed
                    ),
                    "prompt_id": prompt["prompt_id"],
                    "prompt": prompt["prompt"],
                    "condition": ask.condition,
                    "role": ask.role,
                    "text": completion.text,
                    "n_tokens": completion.n_tokens,
                    "finish_reason": completion.finish_reason,
                }
                for prompt, several in zip(prompts.iter_rows(named=True), completions, strict=True)
                for seed, completion in zip(prompt["seeds"], several, strict=True)
            ]
        # The fluency guard: how surprising are the samples to the policy everything started from?
        main = [row for row in rows if row["role"] == "main"]
        pairs = [(str(row["prompt"]), str(row["text"])) for row in main]
        surprise = {
            row["sample_id"]: (-logprob, tokens)
            for row, (logprob, tokens) in zip(main, engine.logprobs(base.path, pairs), strict=True)
        }
        nothing = (None, None)  # probes are not scored: drift is a matter of the main condition
        nll, nll_tokens = zip(*(surprise.get(row["sample_id"], nothing) for row in rows), strict=True)
        samples = pl.DataFrame(rows, infer_schema_length=None).with_columns(
            nll=pl.Series(nll, dtype=pl.Float64), nll_tokens=pl.Series(nll_tokens, dtype=pl.Int64)
        )
        measured = experiment.task.measure(samples)
        scores = score_table(
            samples,
            measured,
            experiment.task.measures,
            policy_hash=model.policy_hash,
            resamples=settings.resamples,
        )
        draft.write("scores", scores, SCORES)
        numbers = measures(measured.drop("sample_id").iter_rows(named=True))
        numbered = measured.select("sample_id", numbers)
        kept = samples.join(numbered, on="sample_id", maintain_order="left")
        draft.write("evaluation_samples", kept.drop("nll", "nll_tokens"), EVALUATION_SAMPLES)
        draft.record(work_seconds=time.monotonic() - started)

    inputs = {"trained_policy": model.policy_hash, "base_policy": base.policy_hash}
    source = evaluation_source(prompts)
    return stage.make({**inputs, "prompts": source}, produce, iteration=iteration)


def _share(report: Callable[..., None], index: int, parts: int, done: int, total: int) -> None:
    """Reports progress within one of several equal parts."""
    report(index * total + done, parts * total)


def _curve(stage: Stage, scores: pl.DataFrame) -> dg.MarkdownMetadataValue:
    """The first measure over the iterations so far, beside the null control's."""
    from textalign_dagster.curves import as_markdown, curves

    name, now = stage.cell
    before = score_rows(stage.store, stage.experiments, name)
    earlier = before.filter((pl.col("experiment") != name) | (pl.col("iteration") < now))
    rows = pl.concat([earlier, placed(scores, name, now)])
    return dg.MetadataValue.md(as_markdown(curves(rows, stage.experiment, name, panels=1)))


def _examples(stage: Stage, samples: pl.DataFrame, show: int = 3) -> list[dict[str, Any]]:
    """Some samples of every condition, with what the first measure counts in them."""
    counted = stage.experiment.task.measures[0].numerator
    shown = samples.group_by("role", "condition", maintain_order=True).head(show)
    asked = pl.col("condition").alias("asked for")
    return shown.select(asked, measure(counted), "prompt", "text").to_dicts()


def _told(scores: pl.DataFrame, metric: str) -> str:
    value = value_of(scores, metric)
    return "-" if value is None else f"{value:.3g}"
