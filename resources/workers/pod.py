"""A worker's pod as the relay sees it: waiting until it runs, how it ended, and cleaning up after others."""

from __future__ import annotations

import contextlib
import select
import signal
import sys
import time
from datetime import UTC, datetime, timedelta
from typing import Any

from resources.compute import pods
from resources.workers.kubernetes import CONTAINER, MACHINE, PROCESS, delete, machine, process

EVERY = 1.0  # seconds between polls of the pod
KEPT = timedelta(hours=1)  # how long a pod that has ended is kept for the process that waits for it

FAILED = 1  # exit code for a container that was lost without one

STUCK = (
    "ErrImagePull",
    "ImagePullBackOff",
    "InvalidImageName",
    "ErrImageNeverPull",
    "CreateContainerConfigError",
    "CreateContainerError",
    "RunContainerError",
)
"""Reasons for which a container waits and which seldom resolve themselves."""


class Lost(Exception):
    """The pod cannot be reached; the message is a sentence."""


class Unwanted(Exception):
    """The process that started the command is gone."""


class Pod:
    """The command's pod, and how to query it."""

    def __init__(self, core: Any, namespace: str, name: str, patience: float) -> None:
        self.core, self.namespace, self.name, self.patience = core, namespace, name, patience

    def look(self) -> Any:
        """The pod as it is now; None: there is none.

        Raises:
            Lost: the cluster does not answer.
            Unwanted: see `pause`.
        """
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        silent = Passing(self.patience)
        while True:
            try:
                return self.core.read_namespaced_pod(
                    self.name, self.namespace, _request_timeout=pods.ANSWER_SECONDS
                )
            except ApiException as error:
                if error.status == 404:
                    return None
                why = pods.words(error)
            except HTTPError as error:
                why = str(error)
            if silent.still(True):
                raise Lost(f"the cluster does not report the state of pod {self.name} ({why})")
            pause()

    def wait_until_it_runs(self) -> None:
        """Returns when the container runs; waits for a node as long as it takes.

        Raises:
            Lost: it will not run.
            Unwanted: see `pause`.
        """
        stuck = Passing(self.patience)
        while True:
            found = self.look()
            if found is None:
                raise Lost(f"pod {self.name} was deleted before it ran")
            state = state_of(found)
            if found.status.phase in ("Succeeded", "Failed") or (state and state.terminated):
                output = self._last_output()
                raise Lost(
                    f"pod {self.name} ended before it could be attached to ({pods.ended(found)}){output}"
                )
            if state is not None and state.running is not None:
                return
            why = obstacle(found)
            if stuck.still(why is not None):
                raise Lost(f"pod {self.name} cannot start: {why}")
            pause()

    def outcome(self) -> int:
        """The exit code for this process, once the container has one; messages go to stderr.

        Raises:
            Lost: it has none, or ended while it was still needed.
            Unwanted: see `pause`.
        """
        settling = Passing(self.patience)
        while True:
            found = self.look()
            if found is None:
                raise Lost(f"pod {self.name} is gone: it was deleted, or its node was lost")
            if found.metadata.deletion_timestamp is not None:
                raise Lost(f"pod {self.name} was deleted{disruption(found)}")
            state = state_of(found)
            ended = state.terminated if state is not None else None
            if ended is not None or found.status.phase == "Failed":
                break
            if settling.still(True):
                raise Lost(f"the connection to pod {self.name} was lost")
            pause()
        code = ended.exit_code if ended is not None else FAILED
        if code == 0:  # workers exit with 0 when their stdin ends
            raise Lost(f"the connection to pod {self.name} was lost, and the worker ended with it")
        message = f"pod {self.name}: {pods.ended(found)}"
        if pods.OUT_OF_MEMORY in message:
            message += "; it had less memory than it needs: raise k8s.memory, or process less at a time"
        print(message, file=sys.stderr)
        known = code <= 128 or code - 128 in {*signal.Signals}
        return code if known else FAILED

    def _last_output(self) -> str:
        """The end of the container's output, if any."""
        from kubernetes.client.exceptions import ApiException
        from urllib3.exceptions import HTTPError

        with contextlib.suppress(ApiException, HTTPError):
            log = self.core.read_namespaced_pod_log(
                self.name,
                self.namespace,
                container=CONTAINER,
                tail_lines=5,
                _request_timeout=pods.ANSWER_SECONDS,
            )
            return f": {log.strip()}" if log.strip() else ""
        return ""


class Passing:
    """A problem that may pass."""

    def __init__(self, patience: float) -> None:
        self.patience = patience
        self.since: float | None = None

    def still(self, problem: bool) -> bool:
        """Whether the problem has lasted for ``patience`` seconds by now."""
        if not problem:
            self.since = None
            return False
        now = time.monotonic()
        self.since = now if self.since is None else self.since
        return now - self.since >= self.patience


def state_of(pod: Any) -> Any:
    """The state of the worker's container (sites may add sidecars); None: it has none yet."""
    found = pod.status.container_statuses or []
    return next((one.state for one in found if one.name == CONTAINER), None)


def disruption(pod: Any) -> str:
    """Why Kubernetes itself removed a pod, in parentheses; empty if it did not."""
    conditions = pod.status.conditions or []
    messages = [one.message for one in conditions if one.type == "DisruptionTarget" and one.message]
    return f" ({messages[0]})" if messages else ""


def obstacle(pod: Any) -> str | None:
    """What keeps a pod from starting, other than waiting for a node, in Kubernetes' words; None: nothing."""
    for status in pod.status.container_statuses or []:
        waiting = status.state.waiting
        if waiting is not None and waiting.reason in STUCK:
            return f"{waiting.reason}: {' '.join((waiting.message or '').split())[: pods.WORDS]}".rstrip(": ")
    for condition in pod.status.conditions or []:
        # A missing claim is reported as if the pod only waited for a node.
        missing = "persistentvolumeclaim" in (condition.message or "") and "not found" in condition.message
        if condition.type == "PodScheduled" and condition.status == "False" and missing:
            return str(condition.message)
    return None


def pause() -> None:
    """Waits for a moment.

    Raises:
        Unwanted: stdin has ended. Data on it is left unread.
    """
    poll = select.poll()
    poll.register(0, 0)
    if any(event & select.POLLHUP for _, event in poll.poll(EVERY * 1000)):
        raise Unwanted


def end_abandoned(core: Any, namespace: str) -> None:
    """Deletes pods of processes on this machine that are gone, and pods of others that ended long ago."""
    from kubernetes.client.exceptions import ApiException
    from urllib3.exceptions import HTTPError

    with contextlib.suppress(ApiException, HTTPError):
        found = core.list_namespaced_pod(
            namespace, label_selector=MACHINE, _request_timeout=pods.ANSWER_SECONDS
        )
        for pod in found.items:
            if pod.metadata.deletion_timestamp is None and is_abandoned(pod):
                delete(core, pod.metadata.name, namespace)


def is_abandoned(pod: Any) -> bool:
    """Whether no process waits for a worker's pod any more."""
    labels: dict[str, str] = pod.metadata.labels
    if labels[MACHINE] == machine():
        owner = labels.get(PROCESS, "")
        pid = owner.partition("-")[0]
        return pid.isdigit() and process(int(pid)) != owner
    ends: list[datetime] = [
        status.state.terminated.finished_at
        for status in pod.status.container_statuses or []
        if status.state.terminated is not None and status.state.terminated.finished_at is not None
    ]
    return bool(ends) and max(ends) < datetime.now(UTC) - KEPT
