"""Hosts for workers other than this machine. The worker itself does not change: lines in, lines out."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from resources.compute.pods import check_folders, check_kubernetes
from resources.compute.slurm import check_slurm
from resources.workers.kubernetes import KubernetesHost
from resources.workers.slurm import SlurmHost
from textalign_dagster.settings import SettingsError
from textalign_dagster.settings.clusters import RayNode, SlurmNode
from textalign_dagster.settings.kubernetes import KubernetesPod


class Host(Protocol):
    """Starts workers on another machine; see `channel.Channel`."""

    @property
    def cpus(self) -> int | None:
        """CPUs of a worker; None: unknown."""
        ...

    def start(
        self, command: list[str], environment: Mapping[str, str]
    ) -> tuple[str, list[str], dict[str, str] | None]:
        """The name of a worker's job, the command that starts it, and that command's environment.

        environment: what the worker needs in addition to what its machine provides.
        A returned environment of None stands for this process' own.
        """
        ...

    def end(self, name: str) -> None:
        """Stops what a killed command may have left behind."""
        ...


@dataclass(frozen=True)
class RayHost:
    """A node of a Ray cluster; `ray_relay` relays the lines."""

    settings: RayNode

    @property
    def cpus(self) -> int | None:
        return max(1, int(self.settings.cpus))

    def start(self, command: list[str], environment: Mapping[str, str]) -> tuple[str, list[str], None]:
        arguments = json.dumps({**self.settings.model_dump(), "environment": dict(environment)})
        return "", [sys.executable, "-P", "-m", "resources.workers.ray_relay", arguments, *command], None

    def end(self, name: str) -> None:
        """Nothing: Ray ends what its drivers leave behind."""


def check_host(
    launcher: str, slurm: SlurmNode, k8s: KubernetesPod, field: str, folders: Iterable[Path] = ()
) -> str | None:
    """Checks the place where workers will run; returns a description of it; None: this machine.

    folders: what workers will read.

    Raises:
        SettingsError: they cannot run there; names the field.
    """
    if launcher == "slurm":
        return check_slurm(slurm, field)
    if launcher == "ray":
        if importlib.util.find_spec("ray") is None:
            raise SettingsError(f"{field}.launcher: ray requires the ray package: pip install -e '.[ray]'")
        return f"ray {importlib.metadata.version('ray')}"
    if launcher == "k8s":
        check_folders(k8s, folders, field)
        return check_kubernetes(k8s, field)
    return None


def host_of(launcher: str, slurm: SlurmNode, ray: RayNode, k8s: KubernetesPod) -> Host | None:
    """The host that a section with `launcher` selects for its workers; None: this machine."""
    hosts: dict[str, Host] = {"slurm": SlurmHost(slurm), "ray": RayHost(ray), "k8s": KubernetesHost(k8s)}
    return hosts.get(launcher)
