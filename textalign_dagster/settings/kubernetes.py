"""Running training and workers as pods of a Kubernetes cluster: the sections ``k8s``."""

from __future__ import annotations

from typing import Any

from pydantic import Field, field_validator

from textalign_dagster.settings import Settings


class KubernetesPod(Settings):
    """One pod on one node: a worker that samples or scores."""

    image: str = Field("", description="Image with textalign in it (deploy/compose/Dockerfile builds one).")
    python: str = Field("python", description="The Python interpreter in the image.")
    namespace: str = Field("default", description="Namespace of the pods.")
    context: str | None = Field(
        None, description="kubeconfig context; null: the current one, or, inside a pod, its own cluster."
    )
    volume_claim: str = Field(
        "", description="Claim of the volume with TEXTALIGN_HOME, which Dagster also mounts."
    )
    mount_path: str = Field(
        "/data", description="Where the volume is mounted, in the pods and where Dagster runs."
    )
    gpus: int = Field(0, ge=0, description="GPUs of the pod (nvidia.com/gpu); 0: CPU only.")
    cpu: str | None = Field(None, description="CPUs requested: 8, 500m; null: the namespace's default.")
    memory: str | None = Field(None, description="Memory requested, which is also the limit: 64Gi.")
    node_selector: dict[str, str] = Field({}, description="Labels that the node must have.")
    tolerations: list[dict[str, Any]] = Field([], description="Tolerations of the pod, as in a pod spec.")
    service_account: str | None = Field(
        None, description="Service account of the pods; null: the default one."
    )
    env_from_secrets: list[str] = Field(
        [], description="Secrets of the namespace whose keys become environment variables of the pod."
    )

    @field_validator("mount_path")
    @classmethod
    def _absolute(cls, path: str) -> str:
        if not path.startswith("/"):
            raise ValueError(f"{path}: a relative path does not work in pods; give an absolute one")
        return path.rstrip("/") or "/"

    def check_complete(self) -> None:
        """Raises ValueError if a field is missing that every pod requires."""
        missing = [name for name in ("image", "volume_claim") if not getattr(self, name)]
        if missing:
            raise ValueError(f"k8s.{missing[0]}: missing; launcher: k8s needs it")


class Kubernetes(KubernetesPod):
    """One pod, which runs all processes of a training run."""

    gpus: int = Field(
        0, ge=0, description="GPUs of the pod (nvidia.com/gpu), one for each process; 0: CPU only."
    )
