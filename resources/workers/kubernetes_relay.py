"""A command in a pod of a Kubernetes cluster, with its stdin and stdout here: what `srun` is for Slurm.

    python -m resources.workers.kubernetes_relay '{"k8s": {"namespace": "lab", …}, "pod": {…}}'

Creates the pod, waits until it runs, attaches to it, and exits with the exit code of its container (128 plus the
signal's number if one killed it). The pod is deleted at the end. When stdin ends, or the connection does,
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
CHUNK = 2**16  # bytes of stdin in a frame; servers limit its size
IDLE_SECONDS = 60.0
"""Seconds without data until an empty message is sent: proxies and kubelets cut idle connections."""
SEND_SECONDS = 600.0  # for sent data to be accepted
READ_SECONDS = 5.0  # for the rest of a frame that has begun to arrive

REFUSED = 2  # exit code: the cluster cannot run the command


def attach(pod: Pod) -> Any:
    """A connection to the container's stdin, stdout and stderr.

    Raises:
        Lost: none can be made.
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
        # The client fails while it handles its own error, which has no body.
        refused = error if isinstance(error, ApiException) else error.__context__
        raise Lost(
            f"cannot attach to pod {pod.name} ({pods.words(refused)}); the user of the kubeconfig needs permission "
            "to get and create pods/attach"
        ) from None
    return found.sock  # frames are read from it directly: the client's own reader keeps all it ever received


def carry(connection: Any) -> str:
    """Relays data both ways until the container's side closes; returns the server's reason, if any.

    One thread does both: a worker reads its stdin whatever else it does, so sending never waits for reading.

    Raises:
        Unwanted: stdin has ended.
    """
    from websocket import ABNF, WebSocketException, WebSocketTimeoutException

    reason = ""
    poll = select.poll()
    poll.register(connection.sock, select.POLLIN)
    poll.register(0, select.POLLIN)
    here = connection.sock.fileno()
    last_sent = time.monotonic()
    send_error = send(connection, b"\n")  # the line that the pod waits for
    while True:
        # Polling does not show what TLS has already decrypted.
        decrypted = getattr(connection.sock, "pending", int)()
        ready = {here} if decrypted else {file for file, _ in poll.poll(IDLE_SECONDS * 1000)}
        if here in ready:
            # Not all that TLS sends is data for us: then this times out, and a partial frame is kept.
            connection.settimeout(READ_SECONDS)
            try:
                kind, frame = connection.recv_data_frame(True)
            except WebSocketTimeoutException:
                continue
            except (WebSocketException, OSError) as error:
                return reason or send_error or str(error)
            if kind == ABNF.OPCODE_CLOSE:
                return reason
            if kind in (ABNF.OPCODE_BINARY, ABNF.OPCODE_TEXT) and frame.data:
                reason += deliver(frame.data[0], frame.data[1:])
        if 0 in ready:
            data = os.read(0, CHUNK)
            if not data:
                raise Unwanted
            send_error = send(connection, data)
            last_sent = time.monotonic()
            if send_error:  # the container may have written more before it ended
                poll.unregister(0)
        elif time.monotonic() - last_sent >= IDLE_SECONDS and not send_error:
            send_error = send(connection, b"")
            last_sent = time.monotonic()


def send(connection: Any, data: bytes) -> str:
    """Sends data to the container's stdin; returns an error message, or an empty string."""
    from websocket import WebSocketException

    connection.settimeout(SEND_SECONDS)
    try:
        connection.send_binary(bytes([STDIN]) + data)
    except (WebSocketException, OSError) as error:
        return str(error) or type(error).__name__
    return ""


def deliver(channel: int, data: bytes) -> str:
    """Forwards data received on a channel; returns the server's error message if it is one, else an empty string."""
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
    arguments = json.loads(sys.argv[1])
    try:
        return relay(KubernetesPod.model_validate(arguments["k8s"]), arguments["pod"], arguments["patience"])
    except Lost as error:
        print(error, file=sys.stderr)
        return FAILED
    except Unwanted:
        return 0


def relay(settings: KubernetesPod, body: dict[str, Any], patience: float) -> int:
    """Runs a pod from creation to deletion; returns the exit code for this process.

    Raises:
        Lost: it ended without an exit code.
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
            reason = carry(connection)
        finally:
            connection.close(timeout=1)  # and with it the worker's stdin
        if reason:
            print(f"pod {name}: {reason}", file=sys.stderr)
        return pod.outcome()
    except ApiException as error:
        problem = (
            f"Kubernetes refuses a pod in namespace {namespace} (HTTP {error.status}): {pods.words(error)}"
        )
    except HTTPError as error:
        problem = f"the Kubernetes cluster cannot be reached: {error}"
    finally:  # also if it was created without a reply
        with contextlib.suppress(ApiException, HTTPError):
            delete(core, name, namespace)
    print(problem, file=sys.stderr)
    return REFUSED


if __name__ == "__main__":
    sys.exit(main())
