"""The parts of Kubernetes' API that trainings and workers use, with local processes as pods.

It tests what goes over the wire: paths, bodies, responses, the frames of an attached connection. It schedules
nothing, pulls no image, mounts no volume and enforces no limit: what passes here has not been tested on
Kubernetes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import parse_qs, urlsplit

import yaml

from tests.toy import PROJECT

STDIN, STDOUT, STDERR, STATUS, CLOSE = 0, 1, 2, 3, 255
PROTOCOLS = ("v5.channel.k8s.io", "v4.channel.k8s.io")
PIECE = 2**15  # bytes of output per frame

STARTED = "2026-01-01T00:00:00Z"


@dataclass
class Pod:
    """A pod; ``process`` is None if its image says that it does not start (`Cluster.create`)."""

    body: dict[str, Any]
    process: subprocess.Popen[bytes] | None
    log: Path
    attached: Attached | None = None
    readers: list[threading.Thread] = field(default_factory=list)
    ended: str = STARTED
    disrupted: str = ""  # why it is being disrupted

    @property
    def runs(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def described(self) -> dict[str, Any]:
        """As the API server describes it."""
        container = self.body["spec"]["containers"][0]
        status: dict[str, Any] = {
            "name": container["name"],
            "image": container["image"],
            "imageID": "",
            "ready": self.runs,
            "restartCount": 0,
        }
        if self.process is None:
            return {**self.body, "status": self._waiting(status)}
        code = self.process.poll()
        if code is None:
            phase, state = "Running", {"running": {"startedAt": STARTED}}
        else:
            killed = code in (-signal.SIGKILL, 128 + signal.SIGKILL)  # the main process, or a child of it
            reason = "Completed" if code == 0 else "OOMKilled" if killed else "Error"
            exit_code = code if code >= 0 else 128 - code
            phase = "Succeeded" if code == 0 else "Failed"
            state = {"terminated": {"exitCode": exit_code, "reason": reason, "finishedAt": self.ended}}
        statuses = [{**status, "state": state}]
        if container.get("stdin"):  # clusters can inject sidecar containers
            statuses.insert(0, {**status, "name": "beside", "state": {"running": {}}})
        pod_status: dict[str, Any] = {"phase": phase, "containerStatuses": statuses}
        if not self.disrupted:
            return {**self.body, "status": pod_status}
        pod_status["conditions"] = [{"type": "DisruptionTarget", "status": "True", "message": self.disrupted}]
        return {
            **self.body,
            "metadata": {**self.body["metadata"], "deletionTimestamp": STARTED},
            "status": pod_status,
        }

    def _waiting(self, status: dict[str, Any]) -> dict[str, Any]:
        why = status["image"].partition("/")[2]
        if why.startswith("0/3"):
            reason = {"reason": "Unschedulable", "message": why.replace("_", " ")}
            return {
                "phase": "Pending",
                "conditions": [{"type": "PodScheduled", "status": "False", **reason}],
            }
        reason = {"reason": why, "message": f'image "{status["image"]}":\nnot found'}
        return {"phase": "Pending", "containerStatuses": [{**status, "state": {"waiting": reason}}]}

    def read(self, channel: int, stream: Any) -> None:
        """Logs the container's output and sends it to the attached client, if any; it is not sent again."""
        while data := stream.read1(PIECE):
            with self.log.open("ab") as log:
                log.write(data)
            if self.attached is not None:
                self.attached.send(channel, data)


class Attached:
    """The server side of an attached connection."""

    def __init__(self, connection: socket.socket, request: bytes, protocols: tuple[str, ...]) -> None:
        from websockets.server import ServerProtocol
        from websockets.typing import Subprotocol

        self.connection, self.sending = connection, threading.Lock()
        self.protocol = ServerProtocol(
            subprotocols=[Subprotocol(name) for name in protocols],
            # A typical server limit: longer lines must come in pieces.
            max_size=2**20,
        )
        self.protocol.receive_data(request)
        (handshake,) = self.protocol.events_received()
        self.protocol.send_response(self.protocol.accept(handshake))  # type: ignore[arg-type]
        self.flush()

    def send(self, channel: int, data: bytes) -> None:
        with self.sending, contextlib.suppress(OSError):
            if self.protocol.state.name == "OPEN":
                self.protocol.send_binary(bytes([channel]) + data)
                self.flush()

    def flush(self) -> None:
        for data in self.protocol.data_to_send():
            if data:
                self.connection.sendall(data)

    def close(self) -> None:
        with self.sending, contextlib.suppress(OSError):
            if self.protocol.state.name == "OPEN":
                self.protocol.send_close(1000)
                self.flush()

    def cut(self) -> None:
        """Cuts the connection, as a proxy does when it restarts."""
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def frames(self) -> Iterator[tuple[int, bytes]]:
        """(channel, data) until the connection is closed, for whatever reason."""
        from websockets.frames import Frame, Opcode

        with contextlib.suppress(OSError):
            while data := self.connection.recv(2**16):
                with self.sending:
                    self.protocol.receive_data(data)
                    events = self.protocol.events_received()
                    self.flush()
                for frame in events:
                    assert isinstance(frame, Frame)
                    if frame.opcode is Opcode.CLOSE:
                        return
                    if frame.opcode is Opcode.BINARY:
                        yield frame.data[0], bytes(frame.data[1:])


@dataclass
class Cluster:
    """An API server; ``created`` holds the pod bodies it received, ``calls`` the requests, and ``sent`` the
    sizes of the chunks received for containers' stdin."""

    folder: Path
    protocols: tuple[str, ...] = PROTOCOLS
    quota: bool = False
    may_attach: bool = True
    pods: dict[str, Pod] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    sent: list[int] = field(default_factory=list)

    @property
    def kubeconfig(self) -> Path:
        return self.folder / "kubeconfig"

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        """Starts a pod; one with an image ``never/REASON`` stays pending for that reason."""
        self.created.append(body)
        container = body["spec"]["containers"][0]
        name = body["metadata"]["name"]
        log = self.folder / f"{name}.log"
        log.touch()
        if container["image"].startswith("never/"):
            self.pods[name] = Pod(body, None, log)
            return body
        process = subprocess.Popen(
            container["command"],
            env={
                "PATH": os.environ["PATH"],
                "PYTHONPATH": str(PROJECT),  # the image includes textalign
                **{e["name"]: e["value"] for e in container["env"]},
            },
            stdin=subprocess.PIPE if container.get("stdin") else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        pod = self.pods[name] = Pod(body, process, log)
        for channel, stream in ((STDOUT, process.stdout), (STDERR, process.stderr)):
            pod.readers.append(threading.Thread(target=pod.read, args=(channel, stream), daemon=True))
            pod.readers[-1].start()
        return body

    def attach(self, pod: Pod, connection: socket.socket, request: bytes) -> None:
        """Serves an attached connection until it ends; with ``stdinOnce``, stdin is closed after the first."""
        process = pod.process
        assert process is not None and process.stdin is not None and pod.attached is None
        attached = pod.attached = Attached(connection, request, self.protocols)

        def wait_and_close() -> None:
            for reader in pod.readers:
                reader.join()
            process.wait()
            attached.send(STATUS, json.dumps({"kind": "Status", "status": "Success"}).encode())
            attached.close()

        threading.Thread(target=wait_and_close, daemon=True).start()
        for channel, data in attached.frames():
            if (channel, data) == (CLOSE, bytes([STDIN])):
                break
            assert channel == STDIN
            self.sent.append(len(data))
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(data)
                process.stdin.flush()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()

    def delete(self, name: str) -> bool:
        pod = self.pods.pop(name, None)
        if pod is None:
            return False
        if pod.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(pod.process.pid, signal.SIGKILL)
            pod.process.wait()
        return True

    def matching(self, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        pods = [pod.described() for pod in list(self.pods.values())]
        for selector in query.get("fieldSelector", []):
            pods = [pod for pod in pods if f"metadata.name={pod['metadata']['name']}" == selector]
        for selector in query.get("labelSelector", []):
            label, has_value, value = selector.partition("=")
            labels = [pod["metadata"]["labels"] for pod in pods]
            fits = [label in had and (not has_value or had[label] == value) for had in labels]
            pods = [pod for pod, fit in zip(pods, fits, strict=True) if fit]
        return pods


C = TypeVar("C", bound=Cluster)


@contextmanager
def fake_kubernetes(folder: Path, kind: type[C] = Cluster) -> Iterator[C]:  # type: ignore[assignment]
    """Runs a server for the duration of the block; its pods end with it."""
    cluster = kind(folder)

    class Handler(BaseHTTPRequestHandler):
        def answer(self, status: int, content: Any) -> None:
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def parts(self) -> tuple[list[str], dict[str, list[str]]]:
            url = urlsplit(self.path)
            cluster.calls.append(f"{self.command} {url.path}")
            return url.path.strip("/").split("/"), parse_qs(url.query)

        def refuse(self, status: int, message: str) -> None:
            self.answer(status, {"kind": "Status", "code": status, "message": message})

        def do_GET(self) -> None:
            parts, query = self.parts()
            if parts == ["version"]:
                version = ("major", "minor", "gitVersion", "gitCommit", "gitTreeState", "buildDate")
                version += ("goVersion", "compiler", "platform")
                self.answer(200, {**dict.fromkeys(version, ""), "gitVersion": "v0-of-a-test"})
            elif parts[-1] == "pods":
                self.answer(
                    200,
                    {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": cluster.matching(query)},
                )
            elif parts[-2] == "pods" and parts[-1] in cluster.pods:
                self.answer(200, cluster.pods[parts[-1]].described())
            elif parts[-1] == "log" and parts[-2] in cluster.pods:
                self.answer(200, cluster.pods[parts[-2]].log.read_text(errors="replace"))
            elif parts[-1] == "attach" and parts[-2] in cluster.pods:
                self.attach(cluster.pods[parts[-2]], query)
            else:
                self.refuse(404, "not found")

        def attach(self, pod: Pod, query: dict[str, list[str]]) -> None:
            name = pod.body["spec"]["containers"][0]["name"]
            assert query == {"container": [name], "stdin": ["True"], "stdout": ["True"], "stderr": ["True"]}
            if not cluster.may_attach:
                self.refuse(403, "pods is forbidden: User cannot create resource pods/attach")
                return
            request = f"{self.requestline}\r\n{self.headers}".replace("\r\n", "\n").replace("\n", "\r\n")
            cluster.attach(pod, self.connection, request.encode())
            self.close_connection = True

        def do_POST(self) -> None:
            self.parts()
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if cluster.quota:
                name = body["metadata"]["name"]
                self.refuse(
                    403, f'pods "{name}" is forbidden: exceeded quota: gpus, requested: 4, limited: 2'
                )
                return
            self.answer(201, cluster.create(body))

        def do_DELETE(self) -> None:
            parts, _ = self.parts()
            existed = cluster.delete(parts[-1])
            self.answer(200 if existed else 404, {"kind": "Status", "code": 200 if existed else 404})

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        where = {"server": f"http://127.0.0.1:{server.server_port}"}
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "fake",
            "clusters": [{"name": "fake", "cluster": where}],
            "users": [{"name": "nobody", "user": {}}],
            "contexts": [{"name": "fake", "context": {"cluster": "fake", "user": "nobody"}}],
        }
        cluster.kubeconfig.write_text(yaml.safe_dump(config))
        try:
            yield cluster
        finally:
            for name in list(cluster.pods):
                cluster.delete(name)
            server.shutdown()
