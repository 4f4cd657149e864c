"""The second stage: samples from the policy."""

import time

import dagster as dg
import polars as pl

from assets.columns import columns_of
from assets.exemplars import exemplars_of
from assets.figures import sample_blocks
from assets.policy import policy
from assets.prompt_draws import prompt_draws
from assets.stage import LOOP, Stage
from resources.configured import SamplerResource, StoreResource
from resources.engines import chunks as sampled_chunks
from resources.engines.sampler import Decoding, Request
from resources.store import Artifact, Draft
from textalign_dagster.experiment.offline import OFFLINE_VERSION, identity, offline_samples
from textalign_dagster.experiment.sources import task_of
from textalign_dagster.ids import content_hash, derive_seed
from textalign_dagster.loop import checks
from textalign_dagster.pool.conditioning import render
from textalign_dagster.settings.offline import Offline
from textalign_dagster.settings.structured import content_of
from textalign_dagster.tables import GENERATIONS
from textalign_dagster.tokenisation import token_counts


@dg.asset(
    **LOOP,
    deps=[prompt_draws, policy],
    pool="gpu",
    kinds={"huggingface", "parquet"},
    check_specs=checks.specs("generations"),
    metadata=columns_of(GENERATIONS),
)
def generations(
    context: dg.AssetExecutionContext, store: StoreResource, sampler: SamplerResource
) -> dg.MaterializeResult:
    """One row per completion sampled from the policy.

    From iteration 2 on the policy is conditioned on the method's exemplar feedback (one for all prompts, or
    one each); iteration 1 is unconditioned. Each sample has its own seed, derived and stored.
    """
    with Stage.of(context, store.open()) as stage:
        experiment, draws = stage.experiment, stage.require("prompt_draws")
        if experiment.offline is None:
            made, conditions = _sampled(stage, sampler, draws)
        else:
            made, conditions = _offline(stage, experiment.offline, draws), []
        rows = made.frame("generations")
        limits = experiment.checks
        return stage.publish(
            made,
            headline=f"{rows.height:,} samples, {rows['n_tokens'].sum():,} tokens",
            rows=rows.height,
            checks=[
                checks.schema(rows, GENERATIONS, ["sample_id"]),
                checks.not_empty(rows, limits.max_empty),
                checks.not_duplicated(rows, limits.max_duplicates),
                checks.conditioned_once(experiment.method.template, rows["condition"], rows["prompt"]),
            ],
            metadata={
                "condition": _in_words(conditions),
                "mean tokens": float(rows["n_tokens"].mean()),  # type: ignore[arg-type]
                "cut off": float((rows["finish_reason"] == "length").mean()),  # type: ignore[arg-type]
                **_surprise(rows),
                "tokens": int(rows["n_tokens"].sum()),
                "examples": sample_blocks(rows.select("condition", "prompt", "text").head(5).to_dicts()),
            },
        )


def _sampled(stage: Stage, sampler: SamplerResource, draws: Artifact) -> tuple[Artifact, list[str | None]]:
    """The policy's samples, and the condition of each prompt."""
    experiment, settings = stage.experiment, stage.experiment.sampling
    model = stage.policy(stage.cell.iteration)
    template, later = experiment.method.template, stage.cell.iteration > 1
    decoding = Decoding(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=settings.min_new_tokens,
        ignore_eos=settings.ignore_eos,
        # Whatever the condition: from then on the policy has the method's tokens.
        banned_tokens=experiment.method.banned_tokens if later else (),
        structured=content_of(settings.structured),
    )
    engine = sampler.of(experiment)
    drawn = draws.frame("prompt_draws")
    conditions: list[str | None] = [None] * drawn.height
    pools: dict[str, str] = {}
    if later:
        conditions, pools = exemplars_of(stage, drawn["prompt_id"].to_list(), pool=stage.cell.iteration - 1)

    def produce(draft: Draft) -> None:
        started = time.monotonic()
        seeds = [
            tuple(derive_seed(root, "sample", i) for i in range(settings.samples_per_prompt))
            for root in drawn["seed"]
        ]
        requests = [
            Request(render(template, condition, prompt), own)
            for prompt, condition, own in zip(drawn["prompt"], conditions, seeds, strict=True)
        ]
        engine_version = engine.engine_version
        sampled = sampled_chunks.sample(
            stage.store,
            engine,
            model.sampled,
            model.policy_hash,
            requests,
            decoding,
            settings.chunk,
            stage.report(),
        )
        rows = [
            {
                "sample_id": content_hash(
                    "sample",
                    draw["draw_id"],
                    model.policy_hash,
                    decoding_id,
                    [condition, template if condition is not None else None],
                    seed,
                ),
                "draw_id": draw["draw_id"],
                "prompt_id": draw["prompt_id"],
                "prompt": draw["prompt"],
                "sample_index": index,
                "policy_hash": model.policy_hash,
                "engine": engine.engine,
                "engine_version": engine_version,
                "condition": condition,
                "text": completion.text,
                "n_tokens": completion.n_tokens,
                "finish_reason": completion.finish_reason,
                "logprob": completion.logprob,
                "seed": seed,
            }
            for draw, condition, own, several in zip(
                drawn.iter_rows(named=True), conditions, seeds, sampled.completions, strict=True
            )
            for index, (seed, completion) in enumerate(zip(own, several, strict=True))
        ]
        frame = pl.DataFrame(rows, schema=GENERATIONS)
        draft.write("generations", frame, GENERATIONS)
        draft.record(
            work_seconds=time.monotonic() - started,
            part_seconds=sampled.seconds,
            tokens=int(frame["n_tokens"].sum()),
            chunks=sampled.chunks,
            found_samples=sampled.found,  # from an interrupted attempt
        )

    decoding_id = content_hash("decoding", decoding.identity, engine.engine, *settings.served.values())
    made = stage.make({"prompt_draws": draws.key, "policy": model.policy_hash, **pools}, produce)
    sampled_chunks.discard(stage.store, made)
    if (left := sampled_chunks.left_over(stage.store)) is not None:
        stage.context.log.warning(left)
    return made, conditions


def _offline(stage: Stage, offline: Offline, draws: Artifact) -> Artifact:
    """The responses of a file to the drawn prompts, as samples."""
    experiment, base = stage.experiment, stage.policy(1)

    def produce(draft: Draft) -> None:
        drawn = draws.frame("prompt_draws")
        found = offline_samples(experiment, task_of(experiment), drawn)
        trusted = experiment.policy.trust_remote_code
        counted = token_counts(base.path, found["text"].to_list(), trust_remote_code=trusted)
        seeded = found.join(drawn.select("draw_id", "seed"), on="draw_id", maintain_order="left")
        frame = seeded.drop("own_id").with_columns(
            policy_hash=pl.lit(content_hash("offline", identity(offline))),
            engine=pl.lit("file"),
            engine_version=pl.lit(OFFLINE_VERSION),
            condition=pl.lit(None, dtype=pl.String),
            n_tokens=pl.Series([count + 1 for count in counted], dtype=pl.Int32),  # with the end token
            finish_reason=pl.lit("stop"),
            logprob=pl.lit(None, dtype=pl.Float64),
        )
        draft.write("generations", frame, GENERATIONS)
        draft.record(tokens=int(frame["n_tokens"].sum()))

    return stage.make({"prompt_draws": draws.key, "base_policy": base.policy_hash}, produce)


def _surprise(rows: pl.DataFrame) -> dict[str, float]:
    """The samples' surprise under their own policy; unknown for responses from a file."""
    if rows["logprob"].null_count():
        return {}
    return {"nats per token": -float(rows["logprob"].sum()) / max(int(rows["n_tokens"].sum()), 1)}


def _in_words(conditions: list[str | None]) -> str:
    """The conditions in words."""
    different = {condition for condition in conditions if condition is not None}
    if len(different) > 1:
        return f"{len(different):,} different conditions, drawn from the datapool"
    return next(iter(different), "none")
