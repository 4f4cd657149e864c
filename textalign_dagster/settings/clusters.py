"""Running training and workers on other machines: the sections ``slurm`` and ``ray``."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, field_validator

from textalign_dagster.settings import Settings

Minutes = Annotated[int, Field(ge=1)]
TimeLimit = Annotated[str, Field(pattern=r"^\d+(-\d+(:\d+){0,2}|(:\d+){0,2})$")]
Option = Annotated[str, Field(pattern=r"^--?[A-Za-z].*$")]

OURS = (
    "array",
    "chdir",
    "dependency",
    "error",
    "export",
    "job-name",
    "nodes",
    "ntasks",
    "ntasks-per-node",
    "open-mode",
    "output",
    "parsable",
    "test-only",
    "wait",
    "wrap",
)
"""sbatch options that this package sets itself; users cannot set them."""

OURS_SHORT = "aDdeJNnoW"


class SlurmNode(Settings):
    """A job of a Slurm cluster on one node: a worker that samples or scores."""

    partition: str | None = Field(None, description="Partition; null: the cluster's default.")
    gpus_per_node: int = Field(
        0, ge=0, description="GPUs per node, one for each training process; 0: CPU only."
    )
    cpus_per_task: int | None = Field(
        None, ge=1, description="CPUs of each node's task; null: the cluster's default."
    )
    time_limit: Minutes | TimeLimit | None = Field(
        None,
        description="Minutes, or in the format of sbatch's --time (2:00:00, 1-12); null: the partition's limit.",
    )
    account: str | None = Field(None, description="Account to charge; null: the user's default.")
    qos: str | None = Field(None, description="Quality of service; null: the default.")
    extra: list[Option] = Field([], description="Further sbatch options: [--constraint=a100, --mem=64G].")
    setup: list[str] = Field(
        [],
        description="Shell commands that every node runs first: [module load cuda, export NCCL_DEBUG=INFO].",
    )

    @field_validator("extra")
    @classmethod
    def _not_ours(cls, extra: list[str]) -> list[str]:
        for option in extra:
            name = option.partition("=")[0].lstrip("-")
            if name in OURS if option.startswith("--") else name[:1] in OURS_SHORT:
                raise ValueError(f"{option}: is set by textalign (nodes: training.slurm.nodes); remove it")
        return extra


class RayNode(Settings):
    """The resources on a Ray cluster for a worker that samples or scores."""

    address: str = Field(
        "auto",
        description="Address of the cluster's head node, as host:port; auto: $RAY_ADDRESS, or the cluster on this machine.",
    )
    cpus: float = Field(1, ge=0, description="CPUs per worker.")
    gpus: float = Field(0, ge=0, description="GPUs per worker.")
    resources: dict[str, float] = Field({}, description="Custom resources per worker: {a100: 1}.")


class Slurm(SlurmNode):
    """A job of a Slurm cluster: one task on every node, which starts that node's processes."""

    nodes: int = Field(
        1, ge=1, description="Number of nodes; training.processes are spread over them evenly."
    )
    shared_folder: str | None = Field(
        None,
        description="Folder for jobs, at the same path on this machine and all nodes; null: slurm/ in TEXTALIGN_HOME.",
    )

    @field_validator("shared_folder")
    @classmethod
    def _absolute(cls, folder: str | None) -> str | None:
        if folder is not None and not folder.startswith("/"):
            raise ValueError(
                f"{folder}: a relative path does not work on other machines; give an absolute one"
            )
        return folder
