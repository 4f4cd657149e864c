"""The edge that closes the loop: checkpoint k becomes the policy of iteration k + 1."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dagster as dg

from assets.stage import LOOP
from textalign_dagster.loop.partitions import LAST_ITERATION, Cell

policy = dg.AssetSpec(
    "policy",
    **LOOP,
    kinds={"huggingface"},
    description="The model an iteration samples from: the base policy in iteration 1, then the checkpoint "
    "of the iteration before, handed over once it is written. It is never materialized on its own.",
)


def hand_over(context: dg.AssetExecutionContext, at: Cell, policy_hash: str, path: Path) -> None:
    """Reports the policy that cell ``at`` samples from.

    Dagster does not allow the edge from checkpoint to policy (a cycle), so events replace it. The
    observation comes first: staleness downstream of an external asset reads observations, its
    partition status reads materializations, and the reverse order makes everything stale at once.
    """
    if at.iteration > LAST_ITERATION:
        return
    metadata: dict[str, Any] = {"policy_hash": policy_hash, "path": dg.MetadataValue.path(str(path))}
    for event in (dg.AssetObservation, dg.AssetMaterialization):
        context.log_event(
            event(
                asset_key=policy.key,
                partition=str(at.key),
                metadata=metadata,
                tags={"dagster/data_version": policy_hash},
            )
        )
