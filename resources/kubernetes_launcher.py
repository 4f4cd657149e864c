"""Trainings as pods of a Kubernetes cluster, through dagster-k8s, with files on a volume that both see.

Messages go through a file on the volume, not through the pod's log, which is rotated and can break
off. Exit code 0 is not believed without the marker the trainer writes last.

A pod does not outlive the run that waits for it: it is deleted when that ends, in whichever way. Where
the run's process was killed, the next run of the same training deletes the pod and starts anew.
"""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from resources.launcher import Launched, Work, end_of_log, read_marker, told_seconds
from resources.pipes_messages import FileReader, Heard
from textalign_dagster.kubernetes_settings import Kubernetes
from textalign_dagster.settings import SettingsError

LABEL = "textalign/training"
RUN = "textalign/run"
SEARCHED = 200_000  # bytes of a log in which a signal is looked for
OUT_OF_MEMORY = "OOMKilled"


@dataclass(frozen=True)
class KubernetesLauncher:
    """One training in one pod."""

    settings: Kubernetes
    key: str  # of what is trained
    home: Path  # TEXTALIGN_HOME, on the volume
    every: float = 5.0  # seconds between two looks at the pod
    settling: float = 120.0  # seconds until a deleted pod is gone, or a node's files show

    def train(self, context: dg.AssetExecutionContext, work: Work) -> Launched:
        """See `resources.launcher.Launcher`.

        Raises:
            SettingsError: there is no cluster to be asked, or the pod could not see the files.
            dg.Failure: it failed, in the trainer's words where it had some, and Kubernetes' own.
        """
        check_kubernetes(self.settings)
        out = work.folder("model")
        for path in (out, self.home):
            if not path.is_relative_to(self.settings.mount_path):
                raise SettingsError(
                    f"training.k8s.mount_path: {path} is not below {self.settings.mount_path}: the pod could not "
                    "see it; put TEXTALIGN_HOME (and TEXTALIGN_CACHE) onto the volume"
                )
        from dagster_k8s import PipesK8sClient

        api = _api(self.settings)
        self._make_way(context, api)
        command = work.write(work.place)
        messages = work.log.with_suffix(".messages")
        messages.parent.mkdir(parents=True, exist_ok=True)
        messages.touch()
        heard = Heard(work.on_progress)
        client = PipesK8sClient(
            message_reader=FileReader(heard, messages),
            kube_context=self.settings.context,
            poll_interval=self.every,
        )
        problem, pod = None, None
        try:
            try:
                client.run(
                    context=context,
                    extras=dict(work.extras),
                    command=[self.settings.python, *command[1:]],
                    namespace=self.settings.namespace,
                    env=dict(work.env),
                    base_pod_meta={"labels": self._labels(context)},
                    base_pod_spec=pod_spec(self.settings),
                    pod_wait_timeout=0,
                    delete_pod_on_completion=False,
                )
            except Exception as error:  # noqa: BLE001 dagster-k8s, kubernetes and urllib3 have their own
                problem = error
            pod = self._look(api)
            self._keep_log(api, pod, work.log)
        finally:
            self._delete(api)
            messages.unlink(missing_ok=True)
        done = self._marker(out / "done.json", wait=problem is None)
        if problem is not None or done is None:
            raise self._failure(pod, problem, heard, work.log) from problem
        if heard.error is not None:
            raise heard.error
        return Launched(told_seconds(done), done)

    def _labels(self, context: dg.AssetExecutionContext) -> dict[str, str]:
        return {LABEL: self.key, RUN: context.run.run_id}

    def _pods(self, api: Any) -> list[Any]:
        found = api.list_namespaced_pod(self.settings.namespace, label_selector=f"{LABEL}={self.key}")
        return list(found.items)

    def _make_way(self, context: dg.AssetExecutionContext, api: Any) -> None:
        """Deletes the pod of a run whose process is gone: its folder is gone, too."""
        for pod in self._pods(api):
            run_id = (pod.metadata.labels or {}).get(RUN, "")
            run = context.instance.get_run_by_id(run_id) if run_id != context.run.run_id else None
            if run is not None and not run.is_finished:
                raise dg.Failure(f"run {run_id[:8]} trains the same in pod {pod.metadata.name}; wait for it")
            context.log.info(f"deleting pod {pod.metadata.name}: the run that waited for it is gone")
        self._delete(api)

    def _delete(self, api: Any) -> None:
        """Deletes the training's pods; returns when they are gone."""
        from kubernetes.client.exceptions import ApiException

        deadline = time.monotonic() + self.settling
        while pods := self._pods(api):
            if time.monotonic() > deadline:
                return  # Kubernetes goes on with it
            for pod in pods:
                if pod.metadata.deletion_timestamp is None:
                    try:
                        api.delete_namespaced_pod(pod.metadata.name, self.settings.namespace)
                    except ApiException as error:
                        if error.status != 404:
                            raise
            time.sleep(min(self.every, 1.0))

    def _look(self, api: Any) -> Any:
        pods = self._pods(api)
        return pods[0] if pods else None

    def _keep_log(self, api: Any, pod: Any, log: Path) -> None:
        from kubernetes.client.exceptions import ApiException

        if pod is None:
            return
        try:
            text = api.read_namespaced_pod_log(pod.metadata.name, self.settings.namespace)
        except ApiException:
            return  # a pod that never ran has none
        with log.open("a", encoding="utf-8") as stream:
            stream.write(text)

    def _marker(self, path: Path, *, wait: bool) -> dict[str, Any] | None:
        """The trainer's marker; what a node has written may take a while to show here."""
        deadline = time.monotonic() + self.settling
        while (found := read_marker(path)) is None and wait and time.monotonic() < deadline:
            time.sleep(min(self.every, 1.0))
        return found

    def _failure(self, pod: Any, problem: Exception | None, heard: Heard, log: Path) -> dg.Failure:
        end = end_of_log(log) if log.exists() else ""
        name = pod.metadata.name if pod is not None else "?"
        state = ended(pod)
        metadata: dict[str, dg.MetadataValue] = {
            "pod": dg.MetadataValue.text(name),
            "pod state": dg.MetadataValue.text(state),
            "log": dg.MetadataValue.path(str(log)),
            "end of log": dg.MetadataValue.md(f"```\n{end}\n```"),
        }
        if heard.exception is not None:
            kind, message = heard.exception
            metadata["exception"] = dg.MetadataValue.text(kind)
            # Bad input is as bad the next time.
            return dg.Failure(
                f"{kind}: {message} (pod {name}: {state})",
                metadata=metadata,
                allow_retries=kind != "JobError",
            )
        if problem is None:
            why = "ended with exit code 0, but the trainer did not say that it is done: it did not finish"
        elif OUT_OF_MEMORY in state:
            why = f"ran out of memory ({state}): raise training.k8s.memory or lower training.batch_size"
        else:
            first = re.sub(r"\s+", " ", str(problem)).strip()[:300]
            why = f"failed ({state})" if pod is not None and state else f"failed: {first}"
        return dg.Failure(f"pod {name} {why}; see the log {log}", metadata=metadata)


def pod_spec(settings: Kubernetes) -> dict[str, Any]:
    """The pod, but for what dagster-k8s adds: name, command and environment."""
    limits: dict[str, str] = {}
    if settings.gpus:
        limits["nvidia.com/gpu"] = str(settings.gpus)
    if settings.memory is not None:
        limits["memory"] = settings.memory
    requests = {name: value for name, value in (("cpu", settings.cpu), ("memory", settings.memory)) if value}
    container: dict[str, Any] = {
        "name": "training",
        "image": settings.image,
        "resources": {"limits": limits, "requests": requests},
        "volumeMounts": [
            {"name": "data", "mountPath": settings.mount_path},
            # Processes of one machine talk through shared memory, of which a pod has 64 MiB otherwise.
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
        "envFrom": [{"secretRef": {"name": name}} for name in settings.env_from_secrets],
    }
    spec: dict[str, Any] = {
        "restartPolicy": "Never",
        "containers": [container],
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
        return "it is gone"
    told = [pod.status.phase, pod.status.reason]
    for status in pod.status.container_statuses or []:
        if status.state.terminated is not None:
            told += [status.state.terminated.reason, f"exit code {status.state.terminated.exit_code}"]
        elif status.state.waiting is not None:
            told.append(status.state.waiting.reason)
    return ", ".join(filter(None, told))


def check_kubernetes(settings: Kubernetes) -> str:
    """Whether pods can be asked for; what was found, in words.

    Raises:
        SettingsError: dagster-k8s is not installed, nothing says where the cluster is, or it does not answer.
    """
    try:
        import dagster_k8s  # noqa: F401
    except ImportError:
        raise SettingsError("training.launcher: k8s needs dagster-k8s: pip install -e '.[k8s]'") from None
    from kubernetes.client.exceptions import ApiException
    from kubernetes.config import ConfigException
    from urllib3.exceptions import HTTPError

    try:
        _api(settings).list_namespaced_pod(settings.namespace, limit=1, _request_timeout=10)
    except ConfigException as error:
        raise SettingsError(
            f"training.launcher: nothing says where the Kubernetes cluster is ({error}); set KUBECONFIG"
        ) from None
    except ApiException as error:
        raise SettingsError(
            f"training.k8s.namespace: pods of {settings.namespace} cannot be listed (HTTP {error.status} "
            f"{error.reason}); the user of the kubeconfig needs that right"
        ) from None
    except HTTPError as error:
        raise SettingsError(f"training.launcher: the Kubernetes cluster does not answer ({error})") from None
    return f"kubernetes: namespace {settings.namespace}, image {settings.image}"


def _api(settings: Kubernetes) -> Any:
    """The cluster's interface, found as dagster-k8s finds it."""
    import os

    import kubernetes

    if settings.context is None and os.environ.get("KUBERNETES_SERVICE_HOST"):
        kubernetes.config.load_incluster_config()
    else:
        kubernetes.config.load_kube_config(context=settings.context)
    return kubernetes.client.CoreV1Api()
