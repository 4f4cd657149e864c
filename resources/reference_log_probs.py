"""Log-probabilities of sequences under reference policies: computed once, shared by all methods.

Each training run that needs some publishes those it had to compute as an artifact; later runs, of any
experiment, read all artifacts of their reference.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from resources.store import Artifact, ArtifactStore, Draft
from textalign_dagster.ids import content_hash
from textalign_dagster.loop.stages import REFERENCE
from textalign_dagster.tables import REFERENCE_LOG_PROBS

VERSION = 1


def known(store: ArtifactStore, policy_hash: str, dtype: str) -> pl.DataFrame:
    """All rows ever computed for a reference in this number format, one per sequence.

    Raises:
        ArtifactError: one of the artifacts is damaged.
    """
    tables = [artifact.frame(REFERENCE) for artifact in _artifacts(store, policy_hash, dtype)]
    if not tables:
        return pl.DataFrame(schema=REFERENCE_LOG_PROBS)
    return pl.concat(tables).unique("tokens_hash", keep="first", maintain_order=True)


def publish(store: ArtifactStore, policy_hash: str, dtype: str, computed: Path) -> None:
    """Publishes the rows that a training run computed; ``policy_hash`` is filled in."""
    rows = pl.read_parquet(computed).with_columns(policy_hash=pl.lit(policy_hash))
    if rows.is_empty():
        return
    inputs = {"policy": policy_hash}
    settings = {"dtype": dtype, "sequences": content_hash("sequences", sorted(rows["tokens_hash"]))}
    key = content_hash(REFERENCE, VERSION, settings, inputs)

    def produce(draft: Draft) -> None:
        draft.write(REFERENCE, rows, REFERENCE_LOG_PROBS)

    store.make(REFERENCE, key, produce, inputs=inputs, settings=settings)


def _artifacts(store: ArtifactStore, policy_hash: str, dtype: str) -> list[Artifact]:
    files = store.storage.entries(f"artifacts/{REFERENCE}")
    keys = sorted(path.split("/")[-2] for path in files if path.endswith("/manifest.json"))
    found = [artifact for key in keys if (artifact := store.find(REFERENCE, key)) is not None]
    return [
        artifact
        for artifact in found
        if artifact.manifest["inputs"]["policy"] == policy_hash
        and artifact.manifest["settings"]["dtype"] == dtype
    ]
