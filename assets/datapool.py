"""The fourth stage: which samples are trained on, and under which condition."""

import math
import time
from collections.abc import Callable, Mapping

import dagster as dg
import polars as pl

from assets.columns import columns_of
from assets.feedback import feedback
from assets.figures import markdown_table, sample_blocks
from assets.stage import LOOP, Stage
from assets.weights import queried_weights
from resources.configured import StoreResource
from resources.store import Artifact, ArtifactError, Draft
from textalign_dagster.experiment import Experiment
from textalign_dagster.ids import content_hash
from textalign_dagster.judging import PAIRS
from textalign_dagster.loop import checks
from textalign_dagster.pool.datapool import build_pool
from textalign_dagster.pool.draw import SHORTFALLS
from textalign_dagster.settings import SettingsError
from textalign_dagster.tables import DATAPOOL, EXAMPLES, SPAN

NOT_CUT_OFF = 2**31 - 1
"""More tokens than any response in a file has."""


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
    rows are kept, with the reason. Earlier iterations are read as tables, never changed.
    """
    with Stage.of(context, store.open()) as stage:
        experiment, now = stage.experiment, stage.cell.iteration
        method, settings = experiment.method, experiment.datapool
        # With drop_factor 1 nothing from earlier iterations remains, so they are not inputs either.
        first = now if settings.drop_factor == 1 else 1
        sources = {
            f"{table}@{k}": stage.require(table, k)
            for k in range(first, now + 1)
            for table in ("generations", "feedback")
        }

        inputs = {name: source.key for name, source in sources.items()}
        weights = dict[str, float]()
        if settings.weights is not None:
            weights = _weights(stage, settings.weights, sources)
            inputs["weights"] = content_hash("weights", weights)

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
            rows = rows.with_columns(weight=pl.col("sample_id").replace_strict(weights, default=1.0))
            if method.wants is None:
                rows = rows.with_columns(status=pl.lit("ok"))  # no feedback was requested, so none failed
            if method.ranking is None:
                rows = method.label(rows)
            pool = build_pool(
                rows,
                settings,
                current=now,
                labels=method.buckets,
                seed=experiment.seed,
                pool_hash=content_hash("datapool", inputs, stage_id),
                sampling_limit=NOT_CUT_OFF
                if experiment.offline is not None
                else experiment.sampling.max_new_tokens,
                quantiles=method.ranking,
                conditions={b: b for b in method.buckets} if method.ranking else None,
            )
            draft.write("datapool", pool.rows, DATAPOOL)
            draft.write("shortfalls", pool.shortfalls, SHORTFALLS)
            draft.write("examples", examples_of(experiment, pool.rows, sources), EXAMPLES)
            seconds = time.monotonic() - started
            draft.record(work_seconds=seconds, part_seconds={"pool": seconds})

        stage_id = content_hash(experiment.model_dump(mode="json", include={"method", "datapool", "seed"}))
        made = stage.make(inputs, produce)
        pool, shortfalls = made.frame("datapool"), made.frame("shortfalls")
        drawn = pool.filter("drawn")
        examples = pool_examples(experiment, made, lambda: sources)
        roles = examples["role"].value_counts().sort("role")
        trained = examples.join(drawn.select("sample_id", "label", "reason"), on="sample_id")
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
                "examples trained on": examples.height,
                **{f"examples {role}": n for role, n in roles.iter_rows() if role != "only"},
                "drawn share": drawn.height / max(pool.height, 1),
                **{f"drawn {label}": int(n) for label, _, n, _ in labels.iter_rows() if label},
                "labels": markdown_table(labels),
                "shortfalls": markdown_table(shortfalls),
                "reasons": markdown_table(pool["reason"].value_counts(sort=True)),
                "examples": sample_blocks(
                    trained.select("label", "role", "condition", "reason", "prompt", "text")
                    .head(5)
                    .to_dicts()
                ),
            },
        )


def _weights(stage: Stage, query: str, sources: Mapping[str, Artifact]) -> dict[str, float]:
    """The weights that the query gives to the pool's samples.

    Raises:
        SettingsError: the query fails or gives none of them a weight, or a weight is negative or not finite.
    """
    found = queried_weights(stage.store, query, "datapool.weights", "sample_id")
    samples = (
        a.frame("generations")["sample_id"] for n, a in sources.items() if n.startswith("generations@")
    )
    known = {sample_id: found[sample_id] for ids in samples for sample_id in ids if sample_id in found}
    if not known:
        raise SettingsError("datapool.weights: the query gives none of the pool's samples a weight")
    bad = next((i for i, weight in known.items() if not (math.isfinite(weight) and weight >= 0)), None)
    if bad is not None:
        raise SettingsError(
            f"datapool.weights: the query gives {bad} the weight {known[bad]}; weights are finite and not negative"
        )
    return known


def examples_of(experiment: Experiment, pool: pl.DataFrame, sources: Mapping[str, Artifact]) -> pl.DataFrame:
    """The examples to train on: the drawn rows of a pool with their samples, arranged by the method.

    Args:
        sources: the tables the pool was built from, ``generations@k`` and ``feedback@k``.
    """
    drawn = pool.filter("drawn")
    origins = sorted(drawn["origin"].unique())
    samples = pl.concat(
        sources[f"generations@{k}"]
        .frame("generations")
        .select("sample_id", "prompt", "text", "finish_reason", "logprob")
        for k in (origins or [pool["origin"].max()])
    )
    rows = drawn.join(samples, on="sample_id", how="left", maintain_order="left")
    rows = rows.join(_beaten(sources), on="sample_id", how="left", maintain_order="left").with_columns(
        pl.col("beaten").fill_null([])
    )
    if marked := _feedback_tables(sources, "feedback_spans"):
        spans = (
            pl.concat(marked)
            .sort("sample_id", "start", "end", "label")
            .group_by("sample_id")
            .agg(spans=pl.struct("start", "end", "score"))
        )
        rows = rows.join(spans, on="sample_id", how="left", maintain_order="left")
        # Feedback that marks nothing is not missing feedback.
        rows = rows.with_columns(pl.col("spans").fill_null([]))
    else:
        rows = rows.with_columns(spans=pl.lit(None, dtype=pl.List(SPAN)))
    try:
        return experiment.method.examples(rows)
    except ValueError as error:
        raise ArtifactError(f"datapool: method {experiment.method.name}: {error}") from None


def _feedback_tables(sources: Mapping[str, Artifact], table: str) -> list[pl.DataFrame]:
    """A table of each iteration's feedback that has it."""
    return [
        artifact.frame(table)
        for name, artifact in sources.items()
        if name.startswith("feedback@") and table in artifact.tables
    ]


def _beaten(sources: Mapping[str, Artifact]) -> pl.DataFrame:
    """The samples that each sample was judged better than: sample_id, beaten."""
    compared = _feedback_tables(sources, "pairs") or [pl.DataFrame(schema=PAIRS)]
    decided = pl.concat(compared).filter(pl.col("winner").is_in(["a", "b"]))
    won = pl.col("winner") == "a"
    return (
        decided.select(
            sample_id=pl.when(won).then("sample_a").otherwise("sample_b"),
            other=pl.when(won).then("sample_b").otherwise("sample_a"),
        )
        .unique(maintain_order=True)
        .group_by("sample_id", maintain_order=True)
        .agg(beaten="other")
    )


def pool_examples(
    experiment: Experiment, pool: Artifact, sources: Callable[[], Mapping[str, Artifact]]
) -> pl.DataFrame:
    """The published examples of a pool; computed for pools of earlier versions, which have none."""
    if "examples" in pool.tables:
        return pool.frame("examples")
    return examples_of(experiment, pool.frame("datapool"), sources())


def _judged(generations: pl.DataFrame, feedback: pl.DataFrame, origin: int) -> pl.DataFrame:
    """Samples with their feedback, one row each.

    A method reads one aspect; several aspects of a sample would be several rows, which the pool's
    key check rejects.
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
