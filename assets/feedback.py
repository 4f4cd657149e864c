"""The third stage: what the judge says of each sample."""

import time
from typing import Any

import dagster as dg
import polars as pl

from assets.columns import columns_of
from assets.figures import sample_blocks
from assets.generations import generations
from assets.stage import LOOP, Stage
from resources.configured import StoreResource
from resources.store import Draft
from textalign_dagster import checks
from textalign_dagster.abandoned import BATCHES_TAG
from textalign_dagster.tables import FEEDBACK


@dg.asset(
    **LOOP,
    deps=[generations],
    kinds={"parquet"},
    check_specs=checks.specs("feedback"),
    metadata=columns_of(FEEDBACK),
)
def feedback(context: dg.AssetExecutionContext, store: StoreResource) -> dg.MaterializeResult:
    """One row per sample and aspect: the reward, or the feedback in words and its score.

    A row that is not `ok` has a reason and no value. The null control asks for no feedback; its
    rows are all `skipped`.
    """
    with Stage.of(context, store.open()) as stage:
        task, kind = stage.experiment.task, stage.experiment.method.wants
        judge = stage.experiment.judge if kind is not None else None
        source = stage.require("generations")
        samples = source.frame("generations")

        def produce(draft: Draft) -> None:
            started = time.monotonic()
            if kind is None:
                rows = _programmatic(_nothing_asked(samples), "none", task.scorer)
            elif judge is None:
                rows = _programmatic(task.feedback(samples, kind), kind, task.scorer)
            else:
                rows, facts = _judged(stage, samples)
                draft.record(**facts, **again)
            draft.write("feedback", rows, FEEDBACK)
            draft.record(work_seconds=time.monotonic() - started)

        again = _asked_again(stage) if judge is not None else {}
        made = stage.make({"generations": source.key}, produce, **again)
        rows = made.frame("feedback")
        judged = rows.join(
            samples.select("sample_id", "prompt", "text", "n_tokens"),
            on="sample_id",
            suffix="_sampled",
        )
        ok = judged.filter(pl.col("status") == "ok")
        limits = stage.experiment.checks
        shares = rows["status"].value_counts(normalize=True)
        return stage.publish(
            made,
            headline=f"{ok.height:,} of {rows.height:,} judged" if kind else "none asked for",
            rows=rows.height,
            checks=[
                checks.schema(rows, FEEDBACK, ["sample_id", "aspect"]),
                checks.usable(rows, limits.max_unusable_feedback),
                checks.length_correlation(
                    ok["value"], ok["text_sampled"].str.len_chars(), limits.max_length_correlation
                ),
            ],
            metadata={
                **{f"share {status}": float(share) for status, share in shares.iter_rows()},
                **_value_figures(ok),
                **({"examples": sample_blocks(_examples(ok))} if ok.height else {}),
            },
        )


def _examples(ok: pl.DataFrame, show: int = 5) -> list[dict[str, Any]]:
    """Samples with what was said of them, from the worst to the best."""
    ordered = ok.sort("value", "sample_id")
    chosen = sorted({round(i * (ok.height - 1) / max(show - 1, 1)) for i in range(show)})
    named = ordered.select(
        "value",
        pl.coalesce("text", "label").alias("feedback"),
        "prompt",
        pl.col("text_sampled").alias("text"),
    )
    return named[chosen].to_dicts()


def _asked_again(stage: Stage) -> dict[str, int]:
    """How often calls that failed have been made again: a new table each time, beside the refused one.

    What a judge could not say because it could not be reached must not be final. Replies that were
    received are in the ledger and are not asked for twice.
    """
    pointer = stage.freshness.pointer(stage.cell.iteration, stage.name)
    if pointer is None:
        return {}
    times = int(pointer.artifact.manifest["facts"].get("asked_again", 0))
    rows = pointer.artifact.frame("feedback")
    if pointer.checks.get("usable") is False and (rows["status"] == "failed").any():
        times += 1
    return {"asked_again": times} if times else {}


def _judged(stage: Stage, samples: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, Any]]:
    """What the experiment's LLM judge says."""
    from resources.judge_batch import BatchPendingError  # needs the extra `judges`
    from resources.judge_client import JudgeError
    from resources.judging import ask_judge

    try:
        return ask_judge(stage.experiment, samples, stage.store, stage.report(), str(stage.cell.key))
    except BatchPendingError as pending:
        run = stage.context.run.run_id
        stage.context.instance.add_run_tags(run, {BATCHES_TAG: " ".join(pending.jobs)})
        raise dg.Failure(str(pending), allow_retries=False) from None
    except JudgeError as error:
        raise dg.Failure(str(error), allow_retries=False) from error


def _programmatic(judged: pl.DataFrame, kind: str, scorer: tuple[str, str]) -> pl.DataFrame:
    """A task's own judgements as rows of FEEDBACK."""
    name, version = scorer
    return judged.with_columns(
        kind=pl.lit(kind),
        scorer=pl.lit(name),
        scorer_version=pl.lit(version),
        parser_version=pl.lit(None, dtype=pl.String),
        call_keys=pl.lit([], dtype=pl.List(pl.String)),
    )


def _nothing_asked(samples: pl.DataFrame) -> pl.DataFrame:
    return samples.select(
        "sample_id",
        aspect=pl.lit("none"),
        value=pl.lit(None, dtype=pl.Float64),
        label=pl.lit(None, dtype=pl.String),
        text=pl.lit(None, dtype=pl.String),
        status=pl.lit("skipped"),
        reason=pl.lit("the method asks for no feedback"),
    )


def _value_figures(ok: pl.DataFrame) -> dict[str, float]:
    if ok["value"].null_count() == ok.height:
        return {}
    quantile = {f"value p{q}": float(ok["value"].quantile(q / 100) or 0.0) for q in (10, 90)}
    return {"value mean": float(ok["value"].mean()), **quantile}  # type: ignore[arg-type]
