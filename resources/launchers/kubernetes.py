"""Training as pods of a Kubernetes cluster, through dagster-k8s, with files on a volume that both mount.

Messages go through a file on the volume, not through the pod's log, which is rotated and can break
off. Exit code 0 is not a success without the marker the trainer writes last.

A pod does not outlive the run that waits for it: it is deleted when the run ends, however it ends. If
the run's process was killed, the next run of the same training deletes the pod and resumes from the
newest snapshot.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from resources.compute.pods import (
    ANSWER_SECONDS,
    OUT_OF_MEMORY,
    check_folders,
    check_kubernetes,
    cluster,
    ended,
    pod_spec,
)
from resources.launchers.failure import failure
from resources.launchers.launcher import Launched, Work, read_marker, told_seconds
from resources.launchers.pipes_messages import FileReader, Heard
from textalign_dagster.settings.kubernetes import Kubernetes
from training.state.snapshot_folder import kept

LABEL = "textalign/training"
RUN = "textalign/run"
FIRST = """
trap 'trap : TERM; kill -TERM 0' TERM
(trap '' TERM; exec "$@") &
wait $!
code=$?
while kill -0 $! 2> /dev/null; do wait $!; code=$?; done
exit $code
"""
"""A pod's entry script: when the pod has to go, the trainer gets the signal, and takes a last snapshot. Otherwise only
the first process would get it, and `accelerate launch` would end at once, and all its processes with it."""


@contextlib.contextmanager
def logged(context: dg.AssetExecutionContext, what: str) -> Iterator[None]:
    """Logs an error while tidying up, which must not hide how the training ended."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 kubernetes and urllib3 have their own types
        context.log.warning(f"{what}: {' '.join(str(error).split())[:300]}")


@dataclass(frozen=True)
class KubernetesLauncher:
    """One training run in one pod."""

    settings: Kubernetes
    key: str  # of what is trained
    home: Path  # TEXTALIGN_HOME, on the volume
    every: float = 5.0  # seconds between polls of the pod
    settling: float = 120.0  # seconds for a deleted pod to disappear, or a node's files to appear

    def train(self, context: dg.AssetExecutionContext, work: Work) -> Launched:
        """See `resources.launchers.launcher.Launcher`.

        Raises:
            SettingsError: no cluster is available, or the pod could not see the files.
            dg.Failure: it failed; with the trainer's message, if any, and Kubernetes' own.
        """
        check_kubernetes(self.settings)
        out = work.folder("model")
        check_folders(self.settings, (out, self.home), "training")
        from dagster_k8s import PipesK8sClient

        api = cluster(self.settings)
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
                    command=["/bin/sh", "-c", FIRST, "textalign", self.settings.python, *command[1:]],
                    namespace=self.settings.namespace,
                    env=dict(work.env),
                    base_pod_meta={"labels": self._labels(context)},
                    base_pod_spec=pod_spec(self.settings, "training"),
                    pod_wait_timeout=0,
                    delete_pod_on_completion=False,
                )
            except Exception as error:  # noqa: BLE001 dagster-k8s, kubernetes and urllib3 have their own types
                problem = error
            with logged(context, "the pod's log cannot be read"):
                pod = next(iter(self._pods(api)), None)
                self._keep_log(api, pod, work.log)
        finally:
            with logged(context, "the pods cannot be deleted; the next run tries again"):
                self._delete(api)
            messages.unlink(missing_ok=True)
        done = self._marker(out / "done.json", wait=problem is None)
        if problem is not None or done is None:
            raise self._failure(pod, problem, heard, work) from problem
        if heard.error is not None:
            raise heard.error
        return Launched(told_seconds(done), done)

    def _labels(self, context: dg.AssetExecutionContext) -> dict[str, str]:
        return {LABEL: self.key, RUN: context.run.run_id}

    def _pods(self, api: Any) -> list[Any]:
        found = api.list_namespaced_pod(
            self.settings.namespace, label_selector=f"{LABEL}={self.key}", _request_timeout=ANSWER_SECONDS
        )
        return list(found.items)

    def _make_way(self, context: dg.AssetExecutionContext, api: Any) -> None:
        """Deletes the pod of a run whose process is gone: its folder is gone, too."""
        for pod in self._pods(api):
            run_id = (pod.metadata.labels or {}).get(RUN, "")
            run = context.instance.get_run_by_id(run_id) if run_id != context.run.run_id else None
            if run is not None and not run.is_finished:
                raise dg.Failure(
                    f"run {run_id[:8]} is already training this in pod {pod.metadata.name}; wait for it"
                )
            context.log.info(f"deleting pod {pod.metadata.name}: the run that waited for it is gone")
        self._delete(api)

    def _delete(self, api: Any) -> None:
        """Deletes the training's pods; returns when they are gone."""
        from kubernetes.client.exceptions import ApiException

        deadline = time.monotonic() + self.settling
        while pods := self._pods(api):
            if time.monotonic() > deadline:
                return  # Kubernetes continues to delete them
            for pod in pods:
                if pod.metadata.deletion_timestamp is None:
                    try:
                        api.delete_namespaced_pod(
                            pod.metadata.name, self.settings.namespace, _request_timeout=ANSWER_SECONDS
                        )
                    except ApiException as error:
                        if error.status != 404:
                            raise
            time.sleep(min(self.every, 1.0))

    def _keep_log(self, api: Any, pod: Any, log: Path) -> None:
        from kubernetes.client.exceptions import ApiException

        if pod is None:
            return
        try:
            text = api.read_namespaced_pod_log(
                pod.metadata.name, self.settings.namespace, _request_timeout=ANSWER_SECONDS
            )
        except ApiException:
            return  # a pod that never ran has none
        with log.open("a", encoding="utf-8") as stream:
            stream.write(text)

    def _marker(self, path: Path, *, wait: bool) -> dict[str, Any] | None:
        """The trainer's marker; what a node has written may take a while to appear here."""
        deadline = time.monotonic() + self.settling
        while (found := read_marker(path)) is None and wait and time.monotonic() < deadline:
            time.sleep(min(self.every, 1.0))
        return found

    def _failure(self, pod: Any, problem: Exception | None, heard: Heard, work: Work) -> dg.Failure:
        name = pod.metadata.name if pod is not None else "?"
        state = ended(pod)
        if problem is None:
            why = "ended with exit code 0, but the trainer did not report that it is done: it did not finish"
        elif OUT_OF_MEMORY in state:
            why = f"ran out of memory ({state}): raise training.k8s.memory or lower training.batch_size"
        else:
            first = " ".join(str(problem).split())[:300]
            why = f"failed ({state})" if pod is not None and state else f"failed: {first}"
        facts = {"pod": dg.MetadataValue.text(name), "pod state": dg.MetadataValue.text(state)}
        left, state = kept(work.unfinished), f"pod {name}: {state}"
        return failure(f"pod {name} {why}", heard, work.log, facts, left=left, state=state)
