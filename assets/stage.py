"""What all assets of the loop share: the cell, the experiment, their inputs, their publication."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import dagster as dg

from assets.figures import figure
from resources.engines.sampler import Adapted, Model, SamplerError
from resources.freshness import Freshness
from resources.store import Artifact, ArtifactError, ArtifactStore, Draft
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.files import Library
from textalign_dagster.experiment.policies import base_policy
from textalign_dagster.loop.abandoned import RETRY_TAG, mark
from textalign_dagster.loop.partitions import GRID, Cell
from textalign_dagster.loop.stages import artifact_key, stage_settings
from textalign_dagster.progress import Finished, announce, reporter
from textalign_dagster.settings import SettingsError

LOOP: dict[str, Any] = {"partitions_def": GRID, "group_name": "loop"}
"""What all assets of the loop have in common: one grid, and dependencies by identity only."""


@dataclass(frozen=True)
class PolicyFolder:
    """A policy on this machine's disk."""

    path: Path
    policy_hash: str
    adapted: Adapted | None = None  # the same as the base policy and an adapter, if adapters are served

    @property
    def sampled(self) -> Model:
        """What an engine samples from."""
        return self.adapted or self.path


@dataclass
class Stage:
    """One stage of one iteration of one experiment."""

    name: str
    context: dg.AssetExecutionContext
    store: ArtifactStore
    cell: Cell
    experiments: Library
    experiment: Experiment
    freshness: Freshness

    @classmethod
    @contextmanager
    def of(cls, context: dg.AssetExecutionContext, store: ArtifactStore) -> Iterator[Stage]:
        """The stage that ``context`` materializes; errors that users can act on become failures.

        Retrying does not help with any of them, so Dagster does not retry.
        """
        cell = Cell.of(context.partition_key)
        mark(context)
        try:
            library = Library.default()
            experiment = library.load(cell.experiment)
            if cell.iteration > experiment.iterations:
                raise SettingsError(
                    f"{cell.experiment} has {experiment.iterations} iterations; raise `iterations` in its "
                    f"file for iteration {cell.iteration}"
                )
            name = context.asset_key.path[-1]
            freshness = Freshness(store, cell.experiment, experiment)
            yield cls(name, context, store, cell, library, experiment, freshness)
        except (SettingsError, ArtifactError, SamplerError) as error:
            raise dg.Failure(str(error), allow_retries=False) from None  # one sentence, no traceback

    def require(self, stage: str, iteration: int | None = None) -> Artifact:
        """The output of a stage that this one builds on.

        Raises:
            ArtifactError: it is missing, stale or blocked by a failed check; the message says what to do.
        """
        at = self.cell.iteration if iteration is None else iteration
        state = self.freshness.state(at, stage)
        pointer = self.freshness.pointer(at, stage)
        if pointer is None or state.kind != "fresh":
            raise ArtifactError(
                f"{self.name} of {self.cell.experiment}, iteration {self.cell.iteration}, builds on {stage} of "
                f"iteration {at}: {state.reason}; "
                + {
                    "missing": f"materialize iteration {at} first",
                    "stale": "materialize that again first (`textalign run` does, in order)",
                    "blocked": "see its check, fix the cause (or the limit under `checks`), and materialize it again",
                }[state.kind]
            )
        return pointer.artifact

    def policy(self, iteration: int) -> PolicyFolder:
        """The policy that an iteration samples from: the base policy, or the checkpoint of the one before.

        Always the base policy if the checkpoints are reward models.
        """
        base = base_policy(self.experiment)
        if iteration == 1 or self.experiment.method.trains != "policy":
            return PolicyFolder(base.path, base.policy_hash)
        checkpoint, adapted = self.require("checkpoint", iteration - 1), None
        if self.experiment.sampling.adapters == "served":
            adapted = Adapted(base.path, checkpoint.path("beside") / "adapter")
        return PolicyFolder(checkpoint.path("model"), checkpoint.manifest["facts"]["policy_hash"], adapted)

    def make(
        self,
        inputs: Mapping[str, str],
        produce: Callable[[Draft], None],
        *,
        iteration: int | None = None,
        **extra: Any,
    ) -> Artifact:
        """The stage's artifact for these inputs: the existing one, or what ``produce`` creates.

        Args:
            inputs: name → key of everything it depends on.
            iteration: whose settings apply, if not this cell's (iteration 0).
            extra: further settings that determine the output.
        """
        at = self.cell.iteration if iteration is None else iteration
        settings = stage_settings(self.experiment, self.name, at)
        started = time.monotonic()
        artifact = self.store.make(
            self.name,
            artifact_key(self.name, {**settings, **extra}, inputs),
            produce,
            inputs=dict(inputs),
            settings=settings,
            seed=self.experiment.seed,
        )
        if artifact.reused:
            self.context.log.info(f"reused {self.name} {artifact.key}: same inputs, same settings")
        else:
            self.context.log.info(f"computed {self.name} in {time.monotonic() - started:.1f} s")
        return artifact

    @property
    def retry_before(self) -> datetime | None:
        """Judge calls that failed before this time are sent again (`textalign run --retry-failed`)."""
        tag = self.context.run.tags.get(RETRY_TAG)
        if tag is None:
            return None
        try:
            time = datetime.fromisoformat(tag)
        except ValueError:
            time = None
        if time is None or time.tzinfo is None:
            raise SettingsError(
                f"the run's tag {RETRY_TAG}: {tag!r} is not a time with an offset; write it as "
                "2026-01-31T12:00:00+00:00"
            )
        return time

    def report(self) -> Callable[..., None]:
        """A progress callback ``(done, total, note="")``."""
        return reporter(str(self.cell.key), self.name, self.context.log.info)

    def publish(
        self,
        artifact: Artifact,
        *,
        headline: str,
        metadata: Mapping[str, Any],
        checks: Sequence[dg.AssetCheckResult] = (),
        rows: int | None = None,
    ) -> dg.MaterializeResult:
        """Points the cell at the artifact and reports to Dagster: data version, figures and checks at once."""
        announce(Finished(str(self.cell.key), self.name, headline, artifact.reused))
        blocking = {
            str(check.check_name): bool(check.passed)
            for check in checks
            if check.severity == dg.AssetCheckSeverity.ERROR
        }
        self.store.assign(
            self.cell.experiment,
            self.cell.iteration,
            self.name,
            artifact,
            settings=stage_settings(self.experiment, self.name, self.cell.iteration),
            checks=blocking,
        )
        parts: dict[str, float] = artifact.manifest["facts"].get("part_seconds", {})
        where = f"where experiment = '{self.cell.experiment}'\nand iteration = {self.cell.iteration}"
        return dg.MaterializeResult(
            data_version=dg.DataVersion(artifact.key),
            check_results=list(checks),
            metadata={
                **{k: figure(v) if isinstance(v, float) else v for k, v in metadata.items()},
                **({"dagster/partition_row_count": rows} if rows is not None else {}),
                "seconds": figure(float(artifact.manifest["seconds"])),
                **{f"seconds {part}": figure(took) for part, took in parts.items() if took >= SHORTEST},
                "reused": artifact.reused,
                "artifact": artifact.key,
                "query": dg.MetadataValue.md(
                    f'```sh\ntextalign sql "\nfrom {TABLE.get(self.name, self.name)}\n{where}"\n```'
                ),
            },
        )


SHORTEST = 0.001
"""Seconds below which a part is not worth showing (a judge that does not exist, say)."""

TABLE = {"checkpoint": "checkpoints", "evaluation": "scores"}
"""Stage → the table with its rows, if it has another name."""
