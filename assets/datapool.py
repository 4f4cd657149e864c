"""The fourth stage: which samples are trained on, and under which condition."""

import time

import dagster as dg
import polars as pl

from assets.columns import columns_of
from assets.feedback import feedback
from assets.figures import markdown_table, sample_blocks
from assets.stage import LOOP, Stage
from resources.configured import StoreResource
from resources.store import Draft
from textalign_dagster.ids import content_hash
from textalign_dagster.loop import checks
from textalign_dagster.pool.datapool import SHORTFALLS, build_pool
from textalign_dagster.tables import DATAPOOL


@dg.asset(
    **LOOP,
    deps=[feedback],
    kinds={"parquet", "polars"},
    check_specs=checks.specs("datapool"),
    metadata=columns_of(DATAPOOL),
)
def datapool(context: dg.AssetExecutionContext, store: StoreResource) -> dg.MaterializeResult:
    """One row per sample of this and earlier iterations: its label, and whether it is trained on.

    A pure function of the feedback tables and the settings under `datapool` and `method`; rejected
    rows stay, with the reason. Earlier iterations are read as tables, never changed.
    """
    with Stage.of(context, store.open()) as stage:
        experiment, now = stage.experiment, stage.cell.iteration
        method, settings = experiment.method, experiment.datapool
        # With drop_factor 1 nothing of the past remains: then it is no input either.
        first = now if settings.drop_factor == 1 else 1
        sources = {
            f"{table}@{k}": stage.require(table, k)
            for k in range(first, now + 1)
            for table in ("generations", "feedback")
        }

        def produce(draft: Draft) -> None:
            started = time.monotonic()
            rows = pl.concat(
                _judged(
                    sources[f"generations@{k}"].frame("generations"),
                    sources[f"feedback@{k}"].frame("feedback"),
                    k,
                )
                for k in range(first, now + 1)
            )
            if method.wants is None:
                rows = rows.with_columns(status=pl.lit("ok"))  # nothing was asked, nothing failed
            if method.ranking is None:
                rows = method.label(rows)
            pool = build_pool(
                rows,
                settings,
                current=now,
                labels=method.buckets,
                seed=experiment.seed,
                pool_hash=content_hash("datapool", {k: a.key for k, a in sources.items()}, stage_id),
                sampling_limit=experiment.sampling.max_new_tokens,
                quantiles=method.ranking,
                conditions={b: b for b in method.buckets} if method.ranking else None,
            )
            draft.write("datapool", pool.rows, DATAPOOL)
            draft.write("shortfalls", pool.shortfalls, SHORTFALLS)
            seconds = time.monotonic() - started
            draft.record(work_seconds=seconds, part_seconds={"pool": seconds})

        stage_id = content_hash(experiment.model_dump(mode="json", include={"method", "datapool", "seed"}))
        made = stage.make({name: source.key for name, source in sources.items()}, produce)
        pool, shortfalls = made.frame("datapool"), made.frame("shortfalls")
        drawn = pool.filter("drawn")
        prompts = pl.concat(
            source.frame("generations").select("sample_id", "prompt", "text")
            for name, source in sources.items()
            if name.startswith("generations")
        )
        trained = drawn.join(prompts, on="sample_id")
        labels = (
            pool.group_by("label")
            .agg(rows=pl.len(), drawn=pl.col("drawn").sum(), value=pl.col("value").mean())
            .sort("label", descending=True, nulls_last=True)
        )
        return stage.publish(
            made,
            headline=f"{drawn.height:,} of {pool.height:,} rows drawn",
            rows=pool.height,
            checks=[
                checks.schema(pool, DATAPOOL, ["sample_id"]),
                checks.balance(shortfalls, experiment.checks.max_shortfall),
                checks.conditioned_once(method.template, trained["condition"], trained["prompt"]),
            ],
            metadata={
                "drawn": drawn.height,
                "drawn share": drawn.height / max(pool.height, 1),
                **{f"drawn {label}": int(n) for label, _, n, _ in labels.iter_rows() if label},
                "labels": markdown_table(labels),
                "shortfalls": markdown_table(shortfalls),
                "reasons": markdown_table(pool["reason"].value_counts(sort=True)),
                "examples": sample_blocks(
                    trained.select("label", "condition", "reason", "prompt", "text").head(5).to_dicts()
                ),
            },
        )


def _judged(generations: pl.DataFrame, feedback: pl.DataFrame, origin: int) -> pl.DataFrame:
    """Samples with what was said of them, one row each.

    A method reads one aspect; several aspects of a sample would be several rows, which the pool's
    key check refuses.
    """
    return (
        generations.select("sample_id", "prompt_id", "n_tokens")
        .with_row_index("position")
        .join(feedback.select("sample_id", "value", "label", "text", "status"), on="sample_id", how="left")
        .with_columns(
            pl.col("position").cast(pl.Int64),
            pl.col("status").fill_null("failed"),
            origin=pl.lit(origin, dtype=pl.Int32),
        )
    )
