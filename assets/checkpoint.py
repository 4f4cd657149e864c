"""The fifth stage: the policy trained on the drawn rows."""

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import dagster as dg
import polars as pl

from assets.columns import columns_of
from assets.datapool import datapool
from assets.policy import hand_over
from assets.stage import LOOP, PolicyFolder, Stage
from assets.training_plan import TrainingPlan
from resources import reference_log_probs
from resources.configured import SamplerResource, StoreResource
from resources.launchers.launcher import Folder, LocalLauncher, Work, accelerate_command, accelerate_env
from resources.launchers.slurm import SlurmLauncher
from resources.store import Draft
from resources.store.provenance import code_revision, environment_hash
from textalign_dagster.experiment.files import home
from textalign_dagster.experiment.policies import policy_hash
from textalign_dagster.tables import CHECKPOINTS
from training.job import PLACES


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
        plan, experiment = TrainingPlan.of(stage), stage.experiment
        where = plan.launcher(launcher)

        def produce(draft: Draft) -> None:
            config = plan.acceleration_config()
            acceleration = plan.acceleration(config)
            examples = plan.examples()

            def write(folder: Folder) -> list[str]:
                examples.write_parquet(folder("job") / "rows.parquet")
                for name, policy in plan.tabulated.items():
                    known = reference_log_probs.known(stage.store, policy, experiment.policy.dtype)
                    known.write_parquet(folder("job") / name)
                path = plan.job(folder, config).write(folder("job") / "job.json")
                file = config.write(folder("job")) if config else None
                command = accelerate_command(replace(acceleration, config_file=file))
                return [*command, "training.train", str(path)]

            sampler.make_room()
            report = stage.report()
            name = f"{stage.cell.experiment}-{stage.cell.iteration:03d}-{draft.attempt}"
            work = Work(
                folder=draft.folder,
                unfinished=plan.unfinished,
                write=write,
                extras={"cell": str(stage.cell.key)},
                env=accelerate_env(acceleration),
                on_progress=lambda p: report(p["done"], p["total"], f"loss {p['loss']:.3f}"),
                log=home() / "logs" / f"{name}.log",
            )
            launched = where.train(context, work)
            job = plan.job(draft.folder, config)
            done: dict[str, Any] = launched.done or {}
            seconds = launched.seconds + done["earlier_seconds"]
            gpu_seconds = seconds * done["accelerators"] or None
            row = {
                "policy_hash": policy_hash(draft.folder("model")),
                "parent": plan.parent.policy_hash,
                "reference": plan.reference.policy_hash if plan.reference else None,
                "pool_hash": examples["pool_hash"][0],
                "config": json.dumps(job.model_dump(mode="json", exclude=set(PLACES))),
                "code_revision": code_revision(),
                "environment_hash": environment_hash(),
                "seed": job.seed,
                "rows": examples.height,
                "steps": done["steps"],
                "final_loss": done["final_loss"],
                "seconds": seconds,
                "gpu_seconds": gpu_seconds,
                "usd": None,
            }
            for name, policy in plan.tabulated.items():
                computed = draft.folder("beside") / name
                if computed.exists():  # missing if the policy is its own reference: one table is enough
                    reference_log_probs.publish(stage.store, policy, experiment.policy.dtype, computed)
                    computed.unlink()  # it is an artifact of its own now
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
                measured=done.get("measured", {}),  # a job of an earlier version has none
                resumed_at=done["resumed_at"],
                **({} if gpu_seconds is None else {"gpu_seconds": gpu_seconds}),
            )

        made = stage.make(plan.inputs, produce)
        shutil.rmtree(plan.unfinished, ignore_errors=True)
        if isinstance(where, SlurmLauncher):
            where.forget()  # only now: until it is published, the job's folder is the only copy
        facts, row = made.manifest["facts"], made.frame("checkpoints").row(0, named=True)
        resumed = (facts.get("resumed_at") or [None])[-1]  # earlier versions did not record it
        trained = PolicyFolder(made.path("model"), facts["policy_hash"])
        sampled = trained if experiment.method.trains == "policy" else stage.policy(1)
        hand_over(context, stage.cell.next, sampled.policy_hash, sampled.path)
        return stage.publish(
            made,
            headline=f"{row['steps']} steps{f' (resumed at {resumed})' if resumed else ''}, loss {row['final_loss']:.3f}",
            metadata={
                "final loss": row["final_loss"],
                "steps": row["steps"],
                "rows": row["rows"],
                "tokens per second": facts["tokens"] / max(facts["work_seconds"], 1e-9),
                # Trainings of earlier versions did not record it.
                **(
                    {"seconds first step": facts["first_step_seconds"]}
                    if "first_step_seconds" in facts
                    else {}
                ),
                **({"resumed at step": resumed} if resumed else {}),
                **{f"training {name}": value for name, value in facts.get("measured", {}).items()},
                **peak_memory(facts["peak_memory"]),
                "policy": row["policy_hash"],
                "parent": row["parent"],
                "folder": dg.MetadataValue.path(str(made.path("model"))),
            },
        )


def peak_memory(found: Mapping[str, int | None] | None) -> dict[str, float]:
    """Peak memory of any process, in GB, as metadata."""
    named = {"peak memory (GB)": "host_bytes", "peak accelerator memory (GB)": "accelerator_bytes"}
    held = {name: (found or {}).get(key) for name, key in named.items()}
    return {name: size / 1e9 for name, size in held.items() if size is not None}
