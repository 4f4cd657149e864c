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
from resources.store import Draft
from textalign_dagster.ids import content_hash, derive_seed
from textalign_dagster.loop import checks
from textalign_dagster.pool.conditioning import render
from textalign_dagster.settings.structured import content_of
from textalign_dagster.tables import GENERATIONS


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

    From iteration 2 on the policy is asked for the method's exemplar feedback (one for all prompts, or
    one each); iteration 1 is unconditioned. Each sample has a seed of its own, derived and stored.
    """
    with Stage.of(context, store.open()) as stage:
        experiment, settings = stage.experiment, stage.experiment.sampling
        draws = stage.require("prompt_draws")
        model = stage.policy(stage.cell.iteration)
        template, later = experiment.method.template, stage.cell.iteration > 1
        decoding = Decoding(
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            max_new_tokens=settings.max_new_tokens,
            min_new_tokens=settings.min_new_tokens,
            ignore_eos=settings.ignore_eos,
            # Whatever is asked for: from then on the policy has the method's tokens.
            banned_tokens=experiment.method.special_tokens if later else (),
            structured=content_of(settings.structured),
        )
        engine = sampler.of(experiment)
        drawn = draws.frame("prompt_draws")
        conditions: list[str | None] = [None] * drawn.height
        pools: dict[str, str] = {}
        if later:
            conditions, pools = exemplars_of(
                stage, drawn["prompt_id"].to_list(), pool=stage.cell.iteration - 1
            )

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
                found_samples=sampled.found,  # of an attempt that was interrupted
            )

        decoding_id = content_hash("decoding", decoding.identity, engine.engine, *settings.served.values())
        made = stage.make({"prompt_draws": draws.key, "policy": model.policy_hash, **pools}, produce)
        sampled_chunks.discard(stage.store, made)
        if (left := sampled_chunks.left_over(stage.store)) is not None:
            context.log.warning(left)
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
                checks.conditioned_once(template, rows["condition"], rows["prompt"]),
            ],
            metadata={
                "condition": _asked_for(conditions),
                "mean tokens": float(rows["n_tokens"].mean()),  # type: ignore[arg-type]
                "cut off": float((rows["finish_reason"] == "length").mean()),  # type: ignore[arg-type]
                "nats per token": -float(rows["logprob"].sum()) / max(int(rows["n_tokens"].sum()), 1),
                "tokens": int(rows["n_tokens"].sum()),
                "examples": sample_blocks(rows.select("condition", "prompt", "text").head(5).to_dicts()),
            },
        )


def _asked_for(conditions: list[str | None]) -> str:
    """The conditions in words."""
    different = {condition for condition in conditions if condition is not None}
    if len(different) > 1:
        return f"{len(different):,} different ones, drawn from the datapool"
    return next(iter(different), "none")
