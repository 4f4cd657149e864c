"""The code location: seven assets on one grid, one job, a schedule and a sensor."""

from __future__ import annotations

import warnings

import dagster as dg

# Checks that know their partition are a preview feature of Dagster 1.13.
warnings.filterwarnings("ignore", category=dg.PreviewWarning)

from assets.checkpoint import checkpoint  # noqa: E402
from assets.datapool import datapool  # noqa: E402
from assets.evaluation import evaluation  # noqa: E402
from assets.feedback import feedback  # noqa: E402
from assets.generations import generations  # noqa: E402
from assets.policy import policy  # noqa: E402
from assets.prompt_draws import prompt_draws  # noqa: E402
from resources.configured import SamplerResource, StoreResource  # noqa: E402
from resources.launcher import LocalLauncher  # noqa: E402
from textalign_dagster.automation import advance, iteration_job, next_iteration  # noqa: E402

LOOP = [policy, prompt_draws, generations, feedback, datapool, checkpoint, evaluation]

defs = dg.Definitions(
    assets=LOOP,
    jobs=[iteration_job],
    schedules=[next_iteration],
    sensors=[advance],
    # The heavy work is in subprocesses; a process per step would only add its start.
    executor=dg.in_process_executor,
    resources={
        "store": StoreResource(url=""),
        "sampler": SamplerResource(),
        "launcher": LocalLauncher(),
    },
)
