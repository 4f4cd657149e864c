"""The code location: seven assets on one grid, one job, a schedule and two sensors."""

from __future__ import annotations

import dagster as dg

from assets.checkpoint import checkpoint
from assets.datapool import datapool
from assets.evaluation import evaluation
from assets.feedback import feedback
from assets.generations import generations
from assets.policy import policy
from assets.prompt_draws import prompt_draws
from resources.configured import SamplerResource, StoreResource
from resources.launchers.launcher import LocalLauncher
from textalign_dagster.automation import advance, collect_batches, iteration_job, next_iteration

LOOP = [policy, prompt_draws, generations, feedback, datapool, checkpoint, evaluation]

defs = dg.Definitions(
    assets=LOOP,
    jobs=[iteration_job],
    schedules=[next_iteration],
    sensors=[advance, collect_batches],
    # The heavy work runs in subprocesses; a process per step would only add start-up time.
    executor=dg.in_process_executor,
    resources={
        "store": StoreResource(url=""),
        "sampler": SamplerResource(),
        "launcher": LocalLauncher(),
    },
)
