"""What the checkpoint of an iteration is trained from, on which rows, and where."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import polars as pl

from assets.datapool import pool_examples
from assets.stage import PolicyFolder, Stage
from resources.launchers.kubernetes import KubernetesLauncher
from resources.launchers.launcher import Acceleration, Folder, Launcher
from resources.launchers.slurm import SlurmLauncher
from resources.store import Artifact, ArtifactError
from textalign_dagster.experiment.files import home
from textalign_dagster.ids import derive_seed
from textalign_dagster.loop.stages import artifact_key, stage_settings
from training.acceleration import AccelerateConfig, accelerators, check_training
from training.job import POLICY_TABLE, REFERENCE_TABLE, Job
from training.settings import Training


@dataclass(frozen=True)
class TrainingPlan:
    """What determines one training run."""

    stage: Stage
    pool: Artifact
    parent: PolicyFolder  # the parent of the checkpoint
    start: PolicyFolder  # the policy whose weights are loaded
    reference: PolicyFolder | None  # the reference of the objective
    before: Artifact | None  # the checkpoint whose optimizer state or adapter is carried over
    inputs: dict[str, str]

    @classmethod
    def of(cls, stage: Stage) -> TrainingPlan:
        """The plan for a stage's cell.

        Raises:
            ArtifactError: an input is missing or not fresh.
        """
        settings, iteration = stage.experiment.training, stage.cell.iteration
        pool = stage.require("datapool")
        sampled_from, base = stage.policy(iteration), stage.policy(1)
        parent = sampled_from if settings.start_from == "parent" else base
        # The base policy with the carried adapter is the parent, too.
        start = base if settings.carries_adapter else parent
        reference = None
        if settings.objective.reference_policy is not None:
            reference = base if settings.objective.reference_policy == "base" else sampled_from
        inputs = {"datapool": pool.key, "policy": sampled_from.policy_hash}
        before = None
        if iteration > 1 and (settings.optimizer_state == "carried" or settings.carries_adapter):
            before = stage.require("checkpoint", iteration - 1)
            inputs[f"checkpoint@{iteration - 1}"] = before.key
        if base in (start, reference):
            inputs["base_policy"] = base.policy_hash
        return cls(stage, pool, parent, start, reference, before, inputs)

    @property
    def settings(self) -> Training:
        """The experiment's section `training`."""
        return self.stage.experiment.training

    @cached_property
    def key(self) -> str:
        """The key of the artifact that this training run produces."""
        stage = self.stage
        settings = stage_settings(stage.experiment, stage.name, stage.cell.iteration)
        return artifact_key(stage.name, settings, self.inputs)

    @property
    def unfinished(self) -> Path:
        """Where its snapshots are kept until it is published."""
        return home() / "unfinished" / self.key

    @property
    def tabulated(self) -> dict[str, str]:
        """Tables of log-probabilities that are computed once and kept: file name → hash of the policy."""
        tables = {}
        if self.reference is not None and "reference log-probs" in self.settings.objective.needs:
            tables[REFERENCE_TABLE] = self.reference.policy_hash
        if self.settings.density_ratio is not None:
            tables[POLICY_TABLE] = self.parent.policy_hash
        return tables

    def launcher(self, local: Launcher) -> Launcher:
        """The launcher that runs it."""
        if self.settings.launcher == "local":
            return local
        if self.settings.launcher == "k8s":
            return KubernetesLauncher(self.settings.k8s, key=self.key, home=home())
        slurm, cell = self.settings.slurm, self.stage.cell
        return SlurmLauncher(
            slurm,
            key=self.key,
            title=f"{cell.experiment}, iteration {cell.iteration}",
            root=Path(slurm.shared_folder) if slurm.shared_folder else home() / "slurm",
        )

    def acceleration_config(self) -> AccelerateConfig | None:
        """How the processes share the work, if there is a configuration.

        Raises:
            SettingsError: training with these settings is not possible here.
        """
        # What other machines have cannot be known here.
        devices = accelerators if self.settings.launcher == "local" else None
        return check_training(self.settings, dtype=self.stage.experiment.policy.dtype, devices=devices)

    def acceleration(self, config: AccelerateConfig | None) -> Acceleration:
        """How the processes are started, except for the configuration file."""
        settings = self.settings
        cpus = settings.slurm.cpus_per_task if settings.launcher == "slurm" else None
        return Acceleration(
            processes=settings.processes,
            machines=settings.machines,
            mixed_precision=settings.mixed_precision,
            threads=None if cpus is None else max(1, cpus * settings.machines // settings.processes),
            deepspeed=sharing_of(config) == "DEEPSPEED",
        )

    def examples(self) -> pl.DataFrame:
        """What the trainer reads, rows of EXAMPLES in the pool's order.

        Raises:
            ArtifactError: there are none.
        """
        drawn = self.pool.frame("datapool").filter("drawn")

        def sources() -> dict[str, Artifact]:
            return {
                f"{table}@{k}": self.stage.require(table, k)
                for k in sorted(drawn["origin"].unique())
                for table in ("generations", "feedback")
            }

        examples = drawn if drawn.is_empty() else pool_examples(self.stage.experiment, self.pool, sources)
        if examples.is_empty():
            cell, method = self.stage.cell, self.stage.experiment.method.name
            raise ArtifactError(
                f"the pool of {cell.experiment}, iteration {cell.iteration}, has {drawn.height} drawn rows, but "
                f"method {method} makes no examples of them; see its shortfalls and the settings under `datapool` "
                "and `method`"
            )
        return examples

    def job(self, folder: Folder, config: AccelerateConfig | None) -> Job:
        """The trainer's job."""
        experiment, settings = self.stage.experiment, self.settings
        before = self.before.path("beside") if self.before else None
        tables = {name: str(folder("job") / name) for name in self.tabulated}
        # Whether it outputs anything that is not part of the policy.
        keeps = settings.optimizer_state == "carried" or settings.lora is not None or bool(tables)
        return Job(
            rows=str(folder("job") / "rows.parquet"),
            policy=str(self.start.path),
            reference=str(self.reference.path) if self.reference else None,
            out=str(folder("model")),
            reference_log_probs=tables.get(REFERENCE_TABLE),
            policy_log_probs=tables.get(POLICY_TABLE),
            beside=str(folder("beside")) if keeps else None,
            adapter=str(before / "adapter") if before and settings.carries_adapter else None,
            optimizer=str(before) if before and settings.optimizer_state == "carried" else None,
            snapshots=str(folder("snapshots")),
            template=experiment.method.template,
            special_tokens=list(experiment.method.special_tokens),
            seed=derive_seed(experiment.seed, "training", self.stage.cell.iteration) % 2**32,
            world_size=settings.processes,
            sharing=sharing_of(config),
            dtype=experiment.policy.dtype,
            max_new_tokens=experiment.sampling.max_new_tokens,
            training=settings,
        )


def sharing_of(config: AccelerateConfig | None) -> Literal["DEEPSPEED", "FSDP"] | None:
    """What shards the weights over the processes, which the trainer verifies."""
    if config is None:
        return None
    return config.kind if config.kind in ("DEEPSPEED", "FSDP") else None
