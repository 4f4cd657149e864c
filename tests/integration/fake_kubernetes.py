"""What of Kubernetes' interface a training speaks to, with local processes for pods.

It proves what goes over the wire: paths, bodies, answers. It schedules nothing, pulls no image, mounts no
volume and enforces no limit: what passes here has not been tested on Kubernetes.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml


@dataclass
class Pod:
    body: dict[str, Any]
    process: subprocess.Popen[bytes]
    log: Path

    def described(self) -> dict[str, Any]:
        """As a server describes it."""
        code = self.process.poll()
        container = self.body["spec"]["containers"][0]
        if code is None:
            phase, state = "Running", {"running": {"startedAt": "2026-01-01T00:00:00Z"}}
        else:
            reason = "Completed" if code == 0 else "OOMKilled" if code == -signal.SIGKILL else "Error"
            exit_code = code if code >= 0 else 128 - code
            phase = "Succeeded" if code == 0 else "Failed"
            state = {"terminated": {"exitCode": exit_code, "reason": reason}}
        status = {
            "name": container["name"],
            "image": container["image"],
            "imageID": "",
            "ready": code is None,
            "restartCount": 0,
            "state": state,
        }
        return {**self.body, "status": {"phase": phase, "containerStatuses": [status]}}


@dataclass
class Cluster:
    """A server; ``created`` are the bodies it was sent, ``calls`` what else it was asked."""

    folder: Path
    pods: dict[str, Pod] = field(default_factory=dict)
    created: list[dict[str, Any]] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)

    @property
    def kubeconfig(self) -> Path:
        return self.folder / "kubeconfig"

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        self.created.append(body)
        container = body["spec"]["containers"][0]
        name = body["metadata"]["name"]
        log = self.folder / f"{name}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                container["command"],
                env={"PATH": os.environ["PATH"], **{e["name"]: e["value"] for e in container["env"]}},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.pods[name] = Pod(body, process, log)
        return body

    def delete(self, name: str) -> bool:
        pod = self.pods.pop(name, None)
        if pod is None:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pod.process.pid, signal.SIGKILL)
        pod.process.wait()
        return True

    def found(self, query: dict[str, list[str]]) -> list[dict[str, Any]]:
        pods = [pod.described() for pod in list(self.pods.values())]
        for selector in query.get("fieldSelector", []):
            pods = [pod for pod in pods if f"metadata.name={pod['metadata']['name']}" == selector]
        for selector in query.get("labelSelector", []):
            label, _, value = selector.partition("=")
            pods = [pod for pod in pods if pod["metadata"]["labels"].get(label) == value]
        return pods


@contextmanager
def fake_kubernetes(folder: Path) -> Iterator[Cluster]:
    """A server that answers until the block ends; its pods end then, too."""
    cluster = Cluster(folder)

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

        def do_GET(self) -> None:
            parts, query = self.parts()
            if parts[-1] == "pods":
                self.answer(
                    200,
                    {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": cluster.found(query)},
                )
            elif parts[-1] == "log" and parts[-2] in cluster.pods:
                self.answer(200, cluster.pods[parts[-2]].log.read_text(errors="replace"))
            else:
                self.answer(404, {"kind": "Status", "code": 404})

        def do_POST(self) -> None:
            self.parts()
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(201, cluster.create(body))

        def do_DELETE(self) -> None:
            parts, _ = self.parts()
            there = cluster.delete(parts[-1])
            self.answer(200 if there else 404, {"kind": "Status", "code": 200 if there else 404})

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
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
