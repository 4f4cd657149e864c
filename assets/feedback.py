"""The third stage: feedback on each sample."""

import time
from functools import partial
from typing import Any

import dagster as dg
import polars as pl

from assets.columns import columns_of
from assets.figures import sample_blocks
from assets.generations import generations
from assets.stage import LOOP, Stage
from assets.verdicts import RETRY, readable_failures, sent_again
from resources.configured import SamplerResource, StoreResource
from resources.feedback_sources import feedback_of
from resources.rewards import trained
from resources.store import Artifact, Draft
from resources.stored_feedback import with_references
from textalign_dagster.judging import PAIRS, Judged
from textalign_dagster.judging.pairs import pair_figures
from textalign_dagster.loop import checks
from textalign_dagster.tables import FEEDBACK, FEEDBACK_REPEATS, FEEDBACK_SPANS

COSTS = {"usd": "usd", "calls": "calls", "calls_cached": "calls from the ledger", "calls_lost": "calls lost"}
"""Recorded fact → its name in the UI."""


@dg.asset(
    **LOOP,
    deps=[generations],
    kinds={"parquet"},
    check_specs=checks.specs("feedback"),
    metadata=columns_of(FEEDBACK),
)
def feedback(
    context: dg.AssetExecutionContext, store: StoreResource, sampler: SamplerResource
) -> dg.MaterializeResult:
    """One row per sample: the reward, the category, or the feedback text and its score.

    A row that is not `ok` has a reason and no value. The null control needs no feedback; its
    rows are all `skipped`. Where a judge compares samples, the table `pairs` has its comparisons.
    """
    with Stage.of(context, store.open()) as stage:
        draws, source = stage.require("prompt_draws"), stage.require("generations")
        samples = with_references(source, draws)

        def produce(draft: Draft) -> None:
            started = time.monotonic()
            found = _feedback(stage, sampler, samples)
            draft.write("feedback", found.rows, FEEDBACK)
            if found.pairs is not None:
                draft.write("pairs", found.pairs, PAIRS)
            if found.repeats is not None:
                draft.write("feedback_repeats", found.repeats, FEEDBACK_REPEATS)
            if found.spans is not None:
                draft.write("feedback_spans", found.spans, FEEDBACK_SPANS)
            seconds = time.monotonic() - started
            # With a judge this is waiting time; any other source computes here.
            part = "score" if stage.experiment.judge is None else "wait"
            draft.record(**found.facts, **again, work_seconds=seconds, part_seconds={part: seconds})

        judge = stage.experiment.judge
        again = {} if judge is None else sent_again(stage, stage.cell.iteration)
        scorer = stage.experiment.sample_scorer if judge is None else None
        made = stage.make(
            {"prompt_draws": draws.key, "generations": source.key, **trained.inputs(scorer, stage.store)},
            produce,
            **again,
        )
        rows, judgements = made.frame("feedback"), _judgements(made)
        judged = rows.join(
            samples.select("sample_id", "prompt", "text", "n_tokens"),
            on="sample_id",
            suffix="_sampled",
        )
        ok = judged.filter(pl.col("status") == "ok")
        limits = stage.experiment.checks
        shares = rows["status"].value_counts(normalize=True)
        facts = made.manifest["facts"]
        needed = stage.experiment.method.wants is not None
        return stage.publish(
            made,
            headline=f"{ok.height:,} of {rows.height:,} judged" if needed else "none needed",
            rows=rows.height,
            checks=[
                checks.schema(rows, FEEDBACK, ["sample_id", "aspect"]),
                checks.usable(judgements, limits.max_unusable_feedback, "" if judge is None else RETRY),
                checks.judge_model(None if judge is None else judge.model, facts.get("reply_models", {})),
                checks.length_correlation(
                    ok["value"], ok["text_sampled"].str.len_chars(), limits.max_length_correlation
                ),
            ],
            metadata={
                **{f"share {status}": float(share) for status, share in shares.iter_rows()},
                **{shown: facts[name] for name, shown in COSTS.items() if name in facts},
                **(pair_figures(made.frame("pairs")) if "pairs" in made.tables else {}),
                **_value_figures(ok),
                **({"examples": sample_blocks(_examples(ok))} if ok.height else {}),
            },
        )


def _feedback(stage: Stage, sampler: SamplerResource, samples: pl.DataFrame) -> Judged:
    """The feedback; errors that users can act on become failures that Dagster does not retry."""
    with readable_failures(stage):
        return feedback_of(
            stage.experiment,
            samples,
            iteration=stage.cell.iteration,
            store=stage.store,
            report=stage.report(),
            purpose=str(stage.cell.key),
            retry_before=stage.retry_before,
            engine=partial(sampler.of, stage.experiment),
        )


def _judgements(made: Artifact) -> pl.DataFrame:
    """The rows that can be unusable: with comparisons the pairs, since one usable pair judges a sample."""
    if "pairs" not in made.tables:
        return made.frame("feedback")
    both = pl.concat_str("sample_a", "sample_b", separator=" vs ")
    compared = made.frame("pairs").select("status", "reason", sample_id=both)
    left_out = made.frame("feedback").filter(pl.col("status") == "skipped")
    return pl.concat([compared, left_out.select(compared.columns)])


def _examples(ok: pl.DataFrame, show: int = 5) -> list[dict[str, Any]]:
    """Samples with their feedback, from the worst to the best."""
    ordered = ok.sort("value", "sample_id")
    chosen = sorted({round(i * (ok.height - 1) / max(show - 1, 1)) for i in range(show)})
    named = ordered.select(
        "value",
        pl.coalesce("text", "label").alias("feedback"),
        "prompt",
        pl.col("text_sampled").alias("text"),
    )
    return named[chosen].to_dicts()


def _value_figures(ok: pl.DataFrame) -> dict[str, float]:
    if ok["value"].null_count() == ok.height:
        return {}
    quantile = {f"value p{q}": float(ok["value"].quantile(q / 100) or 0.0) for q in (10, 90)}
    return {"value mean": float(ok["value"].mean()), **quantile}  # type: ignore[arg-type]
