"""Pods of a Kubernetes cluster: their specification, checks before they are created, and how they ended."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from textalign_dagster.settings import SettingsError
from textalign_dagster.settings.kubernetes import KubernetesPod

OUT_OF_MEMORY = "OOMKilled"
ANSWER_SECONDS = 10.0  # for the cluster to respond
WORDS = 300  # characters of a message that are quoted


def pod_spec(settings: KubernetesPod, container: str) -> dict[str, Any]:
    """The spec of a pod with one container, without the container's command and environment."""
    limits: dict[str, str] = {}
    if settings.gpus:
        limits["nvidia.com/gpu"] = str(settings.gpus)
    if settings.memory is not None:
        limits["memory"] = settings.memory
    requests = {name: value for name, value in (("cpu", settings.cpu), ("memory", settings.memory)) if value}
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "containers": [
            {
                "name": container,
                "image": settings.image,
                "resources": {"limits": limits, "requests": requests},
                "volumeMounts": [
                    {"name": "data", "mountPath": settings.mount_path},
                    # Processes on one machine communicate through shared memory; a pod's default is 64 MiB.
                    {"name": "shared-memory", "mountPath": "/dev/shm"},
                ],
                "envFrom": [{"secretRef": {"name": name}} for name in settings.env_from_secrets],
            }
        ],
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": settings.volume_claim}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
        ],
        "nodeSelector": dict(settings.node_selector),
        "tolerations": [dict(toleration) for toleration in settings.tolerations],
    }
    if settings.service_account is not None:
        spec["serviceAccountName"] = settings.service_account
    return spec


def ended(pod: Any) -> str:
    """How a pod's container ended, in Kubernetes' words."""
    if pod is None:
        return "no longer exists"
    parts, messages = [pod.status.phase, pod.status.reason], [pod.status.message]
    for status in pod.status.container_statuses or []:
        if status.state.terminated is not None:
            parts += [status.state.terminated.reason, f"exit code {status.state.terminated.exit_code}"]
            messages.append(status.state.terminated.message)
        elif status.state.waiting is not None:
            parts.append(status.state.waiting.reason)
            messages.append(status.state.waiting.message)
    return ", ".join([*filter(None, parts), *(" ".join(m.split())[:WORDS] for m in messages if m)])


def cluster(settings: KubernetesPod) -> Any:
    """The cluster's API client, configured as in dagster-k8s; requires the package, see `check_kubernetes`.

    Raises:
        kubernetes.config.ConfigException: no cluster is configured.
    """
    import kubernetes

    if settings.context is None and os.environ.get("KUBERNETES_SERVICE_HOST"):
        inside = kubernetes.client.Configuration()
        kubernetes.config.load_incluster_config(client_configuration=inside)
        return kubernetes.client.CoreV1Api(kubernetes.client.ApiClient(inside))
    return kubernetes.client.CoreV1Api(kubernetes.config.new_client_from_config(context=settings.context))


def version(settings: KubernetesPod) -> str:
    """The cluster's version and address, which any of its users may query.

    Raises:
        SettingsError: the package is not installed, no cluster is configured, or it does not respond.
    """
    try:
        from kubernetes.client import VersionApi
    except ImportError:
        raise SettingsError("dagster-k8s is not installed") from None
    from kubernetes.client.exceptions import ApiException
    from kubernetes.config import ConfigException
    from urllib3.exceptions import HTTPError

    try:
        client = cluster(settings).api_client
    except ConfigException as error:
        raise SettingsError(f"no cluster is configured ({error})") from None
    where = client.configuration.host
    try:
        found = VersionApi(client).get_code(_request_timeout=ANSWER_SECONDS / 3)
    except ApiException as error:
        raise SettingsError(f"{where} replied: {words(error)}") from None
    except HTTPError:
        raise SettingsError(f"no response from {where}") from None
    return f"{found.git_version} at {where}"


def words(error: Any) -> str:
    """The cluster's error message, on one line."""
    try:
        message = json.loads(error.body)["message"]
    except (AttributeError, TypeError, ValueError, KeyError):
        message = getattr(error, "reason", None) or error
    return " ".join(str(message).split())[:WORDS]


def check_kubernetes(settings: KubernetesPod, field: str = "training") -> str:
    """Checks that the cluster responds and its user can list pods; returns a summary.

    Args:
        field: the section with the launcher, for errors.

    Raises:
        SettingsError: dagster-k8s is not installed, no cluster is configured, or it does not respond.
    """
    try:
        import dagster_k8s  # noqa: F401
    except ImportError:
        raise SettingsError(f"{field}.launcher: k8s needs dagster-k8s: pip install -e '.[k8s]'") from None
    from kubernetes.client.exceptions import ApiException
    from kubernetes.config import ConfigException
    from urllib3.exceptions import HTTPError

    try:
        cluster(settings).list_namespaced_pod(settings.namespace, limit=1, _request_timeout=ANSWER_SECONDS)
    except ConfigException as error:
        raise SettingsError(
            f"{field}.launcher: no Kubernetes cluster is configured ({error}); set KUBECONFIG"
        ) from None
    except ApiException as error:
        raise SettingsError(
            f"{field}.k8s.namespace: pods of {settings.namespace} cannot be listed (HTTP {error.status} "
            f"{error.reason}); the user of the kubeconfig needs that permission"
        ) from None
    except HTTPError as error:
        raise SettingsError(f"{field}.launcher: the Kubernetes cluster does not respond ({error})") from None
    return f"kubernetes: namespace {settings.namespace}, image {settings.image}"


def check_folders(settings: KubernetesPod, folders: Iterable[Path], field: str) -> None:
    """Checks that folders are on the volume that pods see.

    Raises:
        SettingsError: names the first that is not.
    """
    for folder in folders:
        if not folder.is_relative_to(settings.mount_path):
            raise SettingsError(
                f"{field}.k8s.mount_path: {folder} is not below {settings.mount_path}: the pod could not "
                "see it; put TEXTALIGN_HOME (and TEXTALIGN_CACHE, HF_HOME) on the volume"
            )
