"""The first stage: which prompts the iteration samples from."""

import dagster as dg

from assets.columns import columns_of
from assets.figures import markdown_table
from assets.policy import hand_over
from assets.stage import LOOP, Stage
from assets.weights import queried_weights
from resources.configured import StoreResource
from resources.store import Draft
from textalign_dagster.experiment.policies import base_policy
from textalign_dagster.experiment.sources import source_hash, task_of, training_prompts
from textalign_dagster.ids import content_hash
from textalign_dagster.loop import checks
from textalign_dagster.prompts import draw_prompts
from textalign_dagster.tables import PROMPT_DRAWS


@dg.asset(
    **LOOP, kinds={"parquet"}, check_specs=checks.specs("prompt_draws"), metadata=columns_of(PROMPT_DRAWS)
)
def prompt_draws(context: dg.AssetExecutionContext, store: StoreResource) -> dg.MaterializeResult:
    """One row per prompt drawn for the iteration; a prompt drawn twice has two rows.

    A pure function of the prompts, the settings under `prompts`, the seed and the iteration.
    """
    with Stage.of(context, store.open()) as stage:
        settings, cell = stage.experiment.prompts, stage.cell
        prompts = training_prompts(stage.experiment)
        left_out = task_of(stage.experiment).notes if settings.path is None else ()
        weights, inputs = None, {"source": source_hash(prompts)}
        if settings.weights is not None:
            weights = queried_weights(stage.store, settings.weights, "prompts.weights", "prompt_id")
            inputs["weights"] = content_hash("weights", weights)

        def produce(draft: Draft) -> None:
            drawn = draw_prompts(
                prompts, settings, seed=stage.experiment.seed, iteration=cell.iteration, weights=weights
            )
            draft.write("prompt_draws", drawn, PROMPT_DRAWS)

        made = stage.make(inputs, produce, draw=cell.iteration)
        if cell.iteration == 1:
            base = base_policy(stage.experiment)
            hand_over(context, cell, base.policy_hash, base.path)
        drawn = made.frame("prompt_draws")
        return stage.publish(
            made,
            headline=f"{drawn.height:,} prompts",
            rows=drawn.height,
            checks=[checks.schema(drawn, PROMPT_DRAWS, ["draw_id"])],
            metadata={
                "different prompts": drawn["prompt_id"].n_unique(),
                "prompts to draw from": prompts.height,
                "left out of the source": "; ".join(left_out) or "nothing",
                "examples": markdown_table(drawn.select("prompt", "source").head(5)),
            },
        )
