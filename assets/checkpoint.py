"""The fifth stage: the policy trained on the drawn rows."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import dagster as dg
import polars as pl

from assets.columns import columns_of
from assets.datapool import datapool
from assets.policy import hand_over
from assets.stage import LOOP, PolicyFolder, Stage
from resources.configured import SamplerResource, StoreResource
from resources.kubernetes_launcher import KubernetesLauncher
from resources.launcher import (
    Acceleration,
    Folder,
    Launcher,
    LocalLauncher,
    Work,
    accelerate_command,
    accelerate_env,
)
from resources.policies import policy_hash
from resources.provenance import code_revision, environment_hash
from resources.slurm_launcher import SlurmLauncher
from resources.store import Artifact, ArtifactError, Draft
from textalign_dagster.acceleration import AccelerateConfig, accelerators, check_training
from textalign_dagster.experiment_files import home
from textalign_dagster.ids import derive_seed
from textalign_dagster.stages import artifact_key, stage_settings
from textalign_dagster.tables import CHECKPOINTS
from textalign_dagster.training_settings import Training
from training.job import PLACES, Job


@dg.asset(
    **LOOP,
    deps=[datapool],
    pool="gpu",
    kinds={"pytorch", "huggingface"},
    metadata=columns_of(CHECKPOINTS),
)
def checkpoint(
    context: dg.AssetExecutionContext,
    store: StoreResource,
    sampler: SamplerResource,
    launcher: dg.ResourceParam[LocalLauncher],
) -> dg.MaterializeResult:
    """One row: the policy trained on the drawn rows, a transformers folder in safetensors.

    `accelerate launch` runs the training; once written, the checkpoint is handed over as the policy
    of the next iteration.
    """
    with Stage.of(context, store.open()) as stage:
        settings = stage.experiment.training
        pool = stage.require("datapool")
        sampled_from, base = stage.policy(stage.cell.iteration), stage.policy(1)
        parent = sampled_from if settings.start_from == "parent" else base
        # One adapter beside the base policy is the parent, too.
        start = base if settings.carries_adapter else parent
        reference = None
        if settings.objective.kl_coef > 0:
            reference = base if settings.objective.kl_reference == "base" else sampled_from
        inputs = {"datapool": pool.key, "policy": sampled_from.policy_hash}
        before = None
        carries = settings.optimizer_state == "carried" or settings.carries_adapter
        if carries and stage.cell.iteration > 1:
            before = stage.require("checkpoint", stage.cell.iteration - 1)
            inputs[f"checkpoint@{stage.cell.iteration - 1}"] = before.key
        if base in (start, reference):
            inputs["base_policy"] = base.policy_hash

        key = artifact_key(
            stage.name, stage_settings(stage.experiment, stage.name, stage.cell.iteration), inputs
        )
        where = launcher_of(stage, launcher, key)
        unfinished = home() / "unfinished" / key

        def produce(draft: Draft) -> None:
            # What other machines have cannot be known here.
            config = check_training(
                settings,
                dtype=stage.experiment.policy.dtype,
                devices=accelerators if settings.launcher == "local" else None,
            )
            rows = training_rows(stage, pool)
            if rows.is_empty():
                raise ArtifactError(
                    f"the pool of {stage.cell.experiment}, iteration {stage.cell.iteration}, has no drawn row to "
                    "train on; see its shortfalls and the settings under `datapool`"
                )
            seed = derive_seed(stage.experiment.seed, "training", stage.cell.iteration) % 2**32
            acceleration = acceleration_of(settings, config)

            def job_in(folder: Folder) -> Job:
                return job_of(
                    stage,
                    rows=folder("job") / "rows.parquet",
                    out=folder("model"),
                    seed=seed,
                    start=start,
                    reference=reference,
                    sharing=sharing_of(config),
                    beside=folder("beside") if keeps_beside(settings) else None,
                    before=before.path("beside") if before else None,
                    snapshots=folder("snapshots"),
                )

            def write(folder: Folder) -> list[str]:
                rows.write_parquet(folder("job") / "rows.parquet")
                path = job_in(folder).write(folder("job") / "job.json")
                file = config.write(folder("job")) if config else None
                command = accelerate_command(replace(acceleration, config_file=file))
                return [*command, "training.train", str(path)]

            sampler.make_room()
            report = stage.report()
            name = f"{stage.cell.experiment}-{stage.cell.iteration:03d}-{draft.attempt}"
            work = Work(
                folder=draft.folder,
                unfinished=unfinished,
                write=write,
                extras={"cell": str(stage.cell.key)},
                env=accelerate_env(acceleration),
                on_progress=lambda p: report(p["done"], p["total"], f"loss {p['loss']:.3f}"),
                log=home() / "logs" / f"{name}.log",
            )
            launched = where.train(context, work)
            job, out = job_in(draft.folder), draft.folder("model")
            done: dict[str, Any] = launched.done or {}
            seconds = launched.seconds + done["earlier_seconds"]
            gpu_seconds = seconds * done["accelerators"] or None
            row = {
                "policy_hash": policy_hash(out),
                "parent": parent.policy_hash,
                "reference": reference.policy_hash if reference else None,
                "pool_hash": rows["pool_hash"][0],
                "config": json.dumps(job.model_dump(mode="json", exclude=set(PLACES))),
                "code_revision": code_revision(),
                "environment_hash": environment_hash(),
                "seed": seed,
                "rows": rows.height,
                "steps": done["steps"],
                "final_loss": done["final_loss"],
                "seconds": seconds,
                "gpu_seconds": gpu_seconds,
                "usd": None,
            }
            draft.write("checkpoints", pl.DataFrame([row], schema=CHECKPOINTS), CHECKPOINTS)
            draft.record(
                policy_hash=row["policy_hash"],
                work_seconds=done["seconds"]["train"],
                part_seconds=done["seconds"],
                first_step_seconds=done["first_step_seconds"],
                losses=done["losses"],
                tokens=done["tokens"],
                peak_memory=done["peak_memory"],
                coefficients=done["coefficients"],
                resumed_at=done["resumed_at"],
                **({} if gpu_seconds is None else {"gpu_seconds": gpu_seconds}),
            )

        made = stage.make(inputs, produce)
        shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(where, SlurmLauncher):
            where.forget()  # only now: until it is published, the job's folder is the only copy
        facts, row = made.manifest["facts"], made.frame("checkpoints").row(0, named=True)
        resumed = (facts.get("resumed_at") or [None])[-1]  # earlier versions have not said it
        hand_over(context, stage.cell.next, facts["policy_hash"], made.path("model"))
        return stage.publish(
            made,
            headline=f"{row['steps']} steps{f' (resumed at {resumed})' if resumed else ''}, loss {row['final_loss']:.3f}",
            metadata={
                "final loss": row["final_loss"],
                "steps": row["steps"],
                "rows": row["rows"],
                "tokens per second": facts["tokens"] / max(facts["work_seconds"], 1e-9),
                # Trainings of earlier versions have not said it.
                **(
                    {"seconds first step": facts["first_step_seconds"]}
                    if "first_step_seconds" in facts
                    else {}
                ),
                **({"resumed at step": resumed} if resumed else {}),
                **peak_memory(facts["peak_memory"]),
                "policy": row["policy_hash"],
                "parent": row["parent"],
                "folder": dg.MetadataValue.path(str(made.path("model"))),
            },
        )


def launcher_of(stage: Stage, local: Launcher, key: str) -> Launcher:
    """Where the experiment's trainings run; ``key`` is that of what is trained."""
    settings = stage.experiment.training
    if settings.launcher == "local":
        return local
    if settings.launcher == "k8s":
        return KubernetesLauncher(settings.k8s, key=key, home=home())
    shared = settings.slurm.shared_folder
    return SlurmLauncher(
        settings.slurm,
        key=key,
        title=f"{stage.cell.experiment}, iteration {stage.cell.iteration}",
        root=Path(shared) if shared else home() / "slurm",
    )


def acceleration_of(settings: Training, config: AccelerateConfig | None) -> Acceleration:
    """How the processes are started, but for the configuration's file."""
    cpus = settings.slurm.cpus_per_task if settings.launcher == "slurm" else None
    return Acceleration(
        processes=settings.processes,
        machines=settings.machines,
        mixed_precision=settings.mixed_precision,
        threads=None if cpus is None else max(1, cpus * settings.machines // settings.processes),
        deepspeed=sharing_of(config) == "DEEPSPEED",
    )


def training_rows(stage: Stage, pool: Artifact) -> pl.DataFrame:
    """The drawn rows with their texts, in the pool's order: what the trainer reads."""
    drawn = pool.frame("datapool").filter("drawn")
    texts = pl.concat(
        stage.require("generations", k)
        .frame("generations")
        .select("sample_id", "prompt", "text", "finish_reason")
        for k in sorted(drawn["origin"].unique())
    )
    wanted = ("sample_id", "prompt", "condition", "text", "finish_reason", "n_tokens", "weight", "pool_hash")
    return drawn.join(texts, on="sample_id", how="left", maintain_order="left").select(wanted)


def peak_memory(found: Mapping[str, int | None] | None) -> dict[str, float]:
    """Most memory that a process has held, in GB, as metadata."""
    named = {"peak memory (GB)": "host_bytes", "peak accelerator memory (GB)": "accelerator_bytes"}
    held = {name: (found or {}).get(key) for name, key in named.items()}
    return {name: size / 1e9 for name, size in held.items() if size is not None}


def keeps_beside(settings: Training) -> bool:
    """Whether a training leaves something that is no part of the policy."""
    return settings.optimizer_state == "carried" or settings.lora is not None


def sharing_of(config: AccelerateConfig | None) -> Literal["DEEPSPEED", "FSDP"] | None:
    """What the processes share the weights with, which the trainer makes sure of."""
    if config is None:
        return None
    return config.kind if config.kind in ("DEEPSPEED", "FSDP") else None


def job_of(
    stage: Stage,
    *,
    rows: Path,
    out: Path,
    seed: int,
    start: PolicyFolder,
    reference: PolicyFolder | None,
    sharing: Literal["DEEPSPEED", "FSDP"] | None,
    beside: Path | None,
    before: Path | None,
    snapshots: Path,
) -> Job:
    """What the trainer is told. ``before``: what the iteration before has left in its ``beside``."""
    experiment = stage.experiment
    carried = experiment.training.optimizer_state == "carried"
    adapted = experiment.training.carries_adapter
    return Job(
        rows=str(rows),
        policy=str(start.path),
        reference=str(reference.path) if reference else None,
        out=str(out),
        beside=str(beside) if beside else None,
        adapter=str(before / "adapter") if before and adapted else None,
        optimizer=str(before) if before and carried else None,
        snapshots=str(snapshots),
        template=experiment.method.template,
        special_tokens=list(experiment.method.special_tokens),
        seed=seed,
        world_size=experiment.training.processes,
        sharing=sharing,
        dtype=experiment.policy.dtype,
        max_new_tokens=experiment.sampling.max_new_tokens,
        training=experiment.training,
    )
