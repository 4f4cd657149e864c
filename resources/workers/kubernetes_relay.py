"""A command in a pod of a Kubernetes cluster, with its stdin and stdout here: what `srun` is to Slurm.

    python -m resources.workers.kubernetes_relay '{"k8s": {"namespace": "lab", …}, "pod": {…}}'

Makes the pod, waits until it runs, attaches to it, and ends with the exit code of its container (128 and the
signal's number, where one killed it). The pod is deleted at the end. When stdin ends, or the connection does,
so does the command's stdin. Messages for the user go to stderr.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import sys
import time
from typing import Any

from resources.compute import pods
from resources.workers.kubernetes import CONTAINER, delete
from resources.workers.pod import FAILED, Lost, Pod, Unwanted, end_abandoned
from textalign_dagster.settings.kubernetes import KubernetesPod

STDIN, STDOUT, STDERR, STATUS = range(4)  # channels of an attached connection
CHUNK = 2**16  # bytes of stdin in a frame; servers bound what they take at a time
IDLE_SECONDS = 60.0
"""Seconds without data until an empty message is sent: proxies and kubelets cut idle connections."""
SEND_SECONDS = 600.0  # for what is sent to be taken
READ_SECONDS = 5.0  # for the rest of what has begun to come

REFUSED = 2  # exit code: the cluster cannot give the command a place


def attach(pod: Pod) -> Any:
    """A connection to the container's stdin, stdout and stderr.

    Raises:
        Lost: there is none to be had.
    """
    import websocket
    from kubernetes.client.exceptions import ApiException
    from kubernetes.stream import stream

    websocket.setdefaulttimeout(pod.patience)
    try:
        found = stream(
            pod.core.connect_get_namespaced_pod_attach,
            pod.name,
            pod.namespace,
            container=CONTAINER,
            stdin=True,
            stdout=True,
            stderr=True,
            binary=True,
            _preload_content=False,
        )
    except (ApiException, AttributeError) as error:
        # The client stumbles over its own error, which has no body.
        refused = error if isinstance(error, ApiException) else error.__context__
        raise Lost(
            f"cannot attach to pod {pod.name} ({pods.words(refused)}); the user of the kubeconfig needs the rights "
            "to get and create pods/attach"
        ) from None
    return found.sock  # frames are read from it: the client's own reading keeps all that ever came


def carry(connection: Any) -> str:
    """Carries lines both ways until the container's end closes; the server's reason for that.

    One thread does both: a worker reads its stdin whatever else it does, so sending never waits for reading.

    Raises:
        Unwanted: stdin has ended.
    """
    from websocket import ABNF, WebSocketException, WebSocketTimeoutException

    said = ""
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    poll.register(0, select.POLLIN)
    here = connection.sock.fileno()
    spoken = time.monotonic()
    silence = send(connection, b"\n")  # which the pod waits for
    while True:
        # What TLS has decrypted already is no longer to be polled for.
        decrypted = getattr(connection.sock, "pending", int)()
        ready = {here} if decrypted else {file for file, _ in poll.poll(IDLE_SECONDS * 1000)}
        if here in ready:
            # Not all that TLS sends is for us: then this times out, and what came of a frame is kept.
            connection.settimeout(READ_SECONDS)
            try:
                kind, frame = connection.recv_data_frame(True)
            except WebSocketTimeoutException:
                continue
            except (WebSocketException, OSError) as error:
                return said or silence or str(error)
            if kind == ABNF.OPCODE_CLOSE:
                return said
            if kind in (ABNF.OPCODE_BINARY, ABNF.OPCODE_TEXT) and frame.data:
                said += deliver(frame.data[0], frame.data[1:])
        if 0 in ready:
            data = os.read(0, CHUNK)
            if not data:
                raise Unwanted
            silence = send(connection, data)
            spoken = time.monotonic()
            if silence:  # the container may have written more before it ended
                poll.unregister(0)
        elif time.monotonic() - spoken >= IDLE_SECONDS and not silence:
            silence = send(connection, b"")
            spoken = time.monotonic()


def send(connection: Any, data: bytes) -> str:
    """Sends data to the container's stdin; why that cannot be done, if so."""
    from websocket import WebSocketException

    connection.settimeout(SEND_SECONDS)
    try:
        connection.send_binary(bytes([STDIN]) + data)
    except (WebSocketException, OSError) as error:
        return str(error) or type(error).__name__
    return ""


def deliver(channel: int, data: bytes) -> str:
    """Passes on what came on a channel; returns the server's own words, where it is those."""
    if channel in (STDOUT, STDERR):
        sink = (sys.stdout if channel == STDOUT else sys.stderr).buffer
        sink.write(data)
        sink.flush()
    if channel != STATUS:
        return ""
    try:
        status = json.loads(data)
        return "" if status.get("status") == "Success" else str(status.get("message", ""))
    except ValueError:
        return data.decode(errors="replace")


def main() -> int:
    problem = json.loads(sys.argv[1])
    try:
        return relay(KubernetesPod.model_validate(problem["k8s"]), problem["pod"], problem["patience"])
    except Lost as error:
        print(error, file=sys.stderr)
        return FAILED
    except Unwanted:
        return 0


def relay(settings: KubernetesPod, body: dict[str, Any], patience: float) -> int:
    """The whole life of a pod; the exit code for this process.

    Raises:
        Lost: it ended in a way that has no exit code.
        Unwanted: stdin has ended.
    """
    from kubernetes.client.exceptions import ApiException
    from kubernetes.config import ConfigException
    from urllib3.exceptions import HTTPError

    name, namespace = body["metadata"]["name"], settings.namespace
    try:
        core = pods.cluster(settings)
    except ConfigException as error:
        print(f"the Kubernetes cluster cannot be reached: {error}", file=sys.stderr)
        return REFUSED
    pod = Pod(core, namespace, name, patience)
    try:
        end_abandoned(core, namespace)
        core.create_namespaced_pod(namespace, body, _request_timeout=pods.ANSWER_SECONDS)
        pod.wait_until_it_runs()
        connection = attach(pod)
        try:
            said = carry(connection)
        finally:
            connection.close(timeout=1)  # and with it the worker's stdin
        if said:
            print(f"pod {name}: {said}", file=sys.stderr)
        return pod.outcome()
    except ApiException as error:
        problem = (
            f"Kubernetes refuses a pod in namespace {namespace} (HTTP {error.status}): {pods.words(error)}"
        )
    except HTTPError as error:
        problem = f"the Kubernetes cluster cannot be reached: {error}"
    finally:  # also where it was created without an answer
        with contextlib.suppress(ApiException, HTTPError):
            delete(core, name, namespace)
    print(problem, file=sys.stderr)
    return REFUSED


if __name__ == "__main__":
    sys.exit(main())
