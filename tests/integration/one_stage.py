"""Materializes one stage of one cell, as a click in the UI would: ``one_stage.py CELL STAGE``."""

import sys

import dagster as dg

from tests.integration import quick
from textalign_dagster.cli.running import dagster_instance
from textalign_dagster.definitions import defs

if __name__ == "__main__":
    quick.install()
    cell, stage = sys.argv[1:]
    with dagster_instance() as instance:
        job = defs.resolve_implicit_global_asset_job_def()
        result = job.execute_in_process(
            partition_key=cell,
            asset_selection=[dg.AssetKey(stage)],
            instance=instance,
            raise_on_error=False,
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
    for event in result.get_step_failure_events():
        failure = event.step_failure_data.user_failure_data
        sys.exit(f"error: {failure.description if failure else event.step_failure_data.error}")
