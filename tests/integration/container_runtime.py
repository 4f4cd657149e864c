"""A private container runtime on this machine: containerd and runc, over the interface that kubelets use.

Kubernetes' API server and kubelet are missing; `Containers` plays their part. The containers, how they end,
their memory limits, and the server of attached connections are real. The image is empty; containers see this
machine's folders instead, including its interpreters.
"""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import os
import re
import shutil
import socket
import subprocess
import tarfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.integration.fake_kubernetes import Cluster, Pod
from tests.toy import PROJECT

PATIENCE = 30.0  # seconds
IMAGE, PAUSE = "docker.io/test/textalign:1", "docker.io/test/pause:1"
OWN = {"proc", "sys", "dev", "run", "etc", "boot", "lost+found"}
"""Folders that each container has to itself."""

CONF = """
version = 2
root = "{folder}/root"
state = "{folder}/state"
[grpc]
  address = "{folder}/socket"
[ttrpc]
  address = "{folder}/ttrpc"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  stream_server_address = "127.0.0.1"
  stream_server_port = "0"
  disable_apparmor = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
"""

SCHEMA = """
RunPodSandboxRequest: 1 config PodSandboxConfig
RunPodSandboxResponse: 1 pod_sandbox_id string
PodSandboxConfig: 1 metadata PodSandboxMetadata, 3 log_directory string, 8 linux LinuxPodSandboxConfig
PodSandboxMetadata: 1 name string, 2 uid string, 3 namespace string
LinuxPodSandboxConfig: 2 security_context LinuxSandboxSecurityContext
LinuxSandboxSecurityContext: 1 namespace_options NamespaceOption
NamespaceOption: 1 network int32, 2 pid int32
CreateContainerRequest: 1 pod_sandbox_id string, 2 config ContainerConfig, 3 sandbox_config PodSandboxConfig
CreateContainerResponse: 1 container_id string
ContainerConfig: 1 metadata ContainerMetadata, 2 image ImageSpec, 3 command *string, 6 envs *KeyValue,
  7 mounts *Mount, 11 log_path string, 12 stdin bool, 13 stdin_once bool, 15 linux LinuxContainerConfig
ContainerMetadata: 1 name string
ImageSpec: 1 image string
KeyValue: 1 key string, 2 value string
Mount: 1 container_path string, 2 host_path string, 3 readonly bool
LinuxContainerConfig: 1 resources LinuxContainerResources, 2 security_context LinuxContainerSecurityContext
LinuxContainerResources: 4 memory_limit_in_bytes int64
LinuxContainerSecurityContext: 3 namespace_options NamespaceOption
StartContainerRequest: 1 container_id string
StartContainerResponse:
ContainerStatusRequest: 1 container_id string
ContainerStatusResponse: 1 status ContainerStatus
ContainerStatus: 3 state int32, 6 finished_at int64, 7 exit_code int32, 10 reason string, 11 message string
AttachRequest: 1 container_id string, 2 stdin bool, 4 stdout bool, 5 stderr bool
AttachResponse: 1 url string
StopContainerRequest: 1 container_id string, 2 timeout int64
StopContainerResponse:
StopPodSandboxRequest: 1 pod_sandbox_id string
StopPodSandboxResponse:
RemovePodSandboxRequest: 1 pod_sandbox_id string
RemovePodSandboxResponse:
"""
"""The parts of the Container Runtime Interface, v1, that are used."""

RUNNING, EXITED = 1, 2  # states of a container
OF_THE_CONTAINER, OF_THE_NODE = 1, 2  # namespaces


def impossible() -> str | None:
    """Why no runtime can be started here; None if one can."""
    missing = [command for command in ("containerd", "ctr", "runc") if shutil.which(command) is None]
    if missing:
        return f"no container runtime is installed ({', '.join(missing)} missing): apt-get install containerd runc"
    if os.geteuid() != 0 or subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
        return "containers need root, and permission to mount"
    if not os.access("/sys/fs/cgroup", os.W_OK):
        return "containers need writable control groups, and those here are read-only"
    return None


class Runtime:
    """The Container Runtime Interface at an address."""

    def __init__(self, address: Path) -> None:
        self.channel: Any = importlib.import_module("grpc").insecure_channel(f"unix://{address}")
        self.messages = messages()
        self.json: Any = importlib.import_module("google.protobuf.json_format")

    def __call__(self, method: str, **request: Any) -> dict[str, Any]:
        call = self.channel.unary_unary(
            f"/runtime.v1.RuntimeService/{method}",
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=self.messages[f"{method}Response"].FromString,
        )
        response = call(
            self.json.ParseDict(request, self.messages[f"{method}Request"]()),
            timeout=PATIENCE,
            wait_for_ready=True,
        )
        return dict(self.json.MessageToDict(response, preserving_proto_field_name=True))


def messages() -> dict[str, Any]:
    """Classes of the messages in `SCHEMA`."""
    descriptors: Any = importlib.import_module("google.protobuf.descriptor_pb2")
    pool: Any = importlib.import_module("google.protobuf.descriptor_pool").DescriptorPool()
    factory: Any = importlib.import_module("google.protobuf.message_factory")
    file = descriptors.FileDescriptorProto(name="cri.proto", package="runtime.v1", syntax="proto3")
    kinds = descriptors.FieldDescriptorProto
    names = []
    for line in SCHEMA.replace(",\n", ",").strip().splitlines():
        name, _, fields = line.partition(":")
        names.append(name)
        message = file.message_type.add(name=name)
        for spec in filter(None, fields.split(",")):
            number, field_name, kind = spec.split()
            added = message.field.add(name=field_name, number=int(number))
            added.label = kinds.LABEL_REPEATED if kind.startswith("*") else kinds.LABEL_OPTIONAL
            kind = kind.lstrip("*")
            if kind[0].isupper():
                added.type, added.type_name = kinds.TYPE_MESSAGE, f".runtime.v1.{kind}"
            else:
                added.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool.Add(file)
    return {name: factory.GetMessageClass(pool.FindMessageTypeByName(f"runtime.v1.{name}")) for name in names}


@contextmanager
def container_runtime(folder: Path) -> Iterator[Runtime]:
    """A containerd with two images, for the duration of the block."""
    conf = folder / "config.toml"
    conf.write_text(CONF.format(folder=folder, pause=PAUSE))
    with (folder / "log").open("wb") as log:
        daemon = subprocess.Popen(["containerd", "-c", str(conf)], stdout=log, stderr=subprocess.STDOUT)
    try:
        runtime = Runtime(folder / "socket")
        importlib.import_module("grpc").channel_ready_future(runtime.channel).result(PATIENCE)
        for name, files in ((PAUSE, with_libraries("/usr/bin/sleep")), (IMAGE, [])):
            archive = write_image(folder / "image.tar", name, files)
            ctr = ["ctr", "--address", str(folder / "socket"), "--namespace", "k8s.io", "images", "import"]
            subprocess.run([*ctr, str(archive)], check=True, capture_output=True)
        yield runtime
    finally:
        daemon.terminate()
        daemon.wait(PATIENCE)


def refusal(runtime: Runtime) -> str | None:
    """Why the runtime, which is up, cannot start a container here; None if it can."""
    config = {
        "metadata": {"name": "trial", "uid": "trial", "namespace": "lab"},
        "linux": {
            "security_context": {"namespace_options": {"network": OF_THE_NODE, "pid": OF_THE_CONTAINER}}
        },
    }
    try:
        sandbox = runtime("RunPodSandbox", config=config)["pod_sandbox_id"]
    except importlib.import_module("grpc").RpcError as error:
        return f"no container can be started here: {error.details()}"
    runtime("StopPodSandbox", pod_sandbox_id=sandbox)
    runtime("RemovePodSandbox", pod_sandbox_id=sandbox)
    return None


def with_libraries(program: str) -> list[Path]:
    """A program and the shared libraries that it loads."""
    output = subprocess.run(["ldd", program], check=True, capture_output=True, text=True).stdout
    return [Path(program), *(Path(library) for library in re.findall(r"(/\S+) \(0x", output))]


def write_image(path: Path, name: str, files: list[Path]) -> Path:
    """An OCI image with a few files of this machine; it sleeps unless given another command."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as out:
        for folder in sorted(entry for entry in Path("/").iterdir() if entry.is_dir()):
            entry = tarfile.TarInfo(folder.name)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            if folder.is_symlink():  # bin, of usr/bin
                entry.type, entry.linkname = tarfile.SYMTYPE, str(folder.readlink())
            out.addfile(entry)
        for file in files:
            out.add(file.resolve(), str(file).lstrip("/"))
    with tarfile.open(path, "w") as out:

        def add(place: str, data: bytes) -> None:
            entry = tarfile.TarInfo(place)
            entry.size = len(data)
            out.addfile(entry, io.BytesIO(data))

        def blob(media: str, data: bytes) -> dict[str, Any]:
            digest = hashlib.sha256(data).hexdigest()
            add(f"blobs/sha256/{digest}", data)
            return {
                "mediaType": f"application/vnd.oci.image.{media}",
                "digest": f"sha256:{digest}",
                "size": len(data),
            }

        layers = [blob("layer.v1.tar", layer.getvalue())]
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {"Entrypoint": ["/usr/bin/sleep", "infinity"]},
            "rootfs": {"type": "layers", "diff_ids": [layers[0]["digest"]]},
        }
        manifest = {
            "schemaVersion": 2,
            "config": blob("config.v1+json", json.dumps(config).encode()),
            "layers": layers,
        }
        listed = blob("manifest.v1+json", json.dumps(manifest).encode())
        listed["annotations"] = {"io.containerd.image.name": name}
        add("index.json", json.dumps({"schemaVersion": 2, "manifests": [listed]}).encode())
        add("oci-layout", b'{"imageLayoutVersion": "1.0.0"}')
    return path


@dataclass
class ContainerPod(Pod):
    """A pod backed by a container."""

    runtime: Runtime | None = None
    sandbox: str = ""
    container: str = ""
    connection: socket.socket | None = None
    passed: int = 0  # chunks forwarded to it

    def status(self) -> dict[str, Any]:
        assert self.runtime is not None
        response = self.runtime("ContainerStatus", container_id=self.container)
        return dict(response["status"])

    @property
    def runs(self) -> bool:
        return self.status().get("state") == RUNNING

    def described(self) -> dict[str, Any]:
        """As a kubelet reports it to an API server."""
        current = self.status()
        code = current.get("exit_code", 0)
        state: dict[str, Any] = {"waiting": {"reason": "ContainerCreating"}}
        phase = "Pending"
        if current.get("state") == RUNNING:
            phase, state = "Running", {"running": {}}
        elif current.get("state") == EXITED:
            finished = datetime.fromtimestamp(int(current["finished_at"]) / 1e9, UTC)
            terminated = {"exitCode": code, "reason": current["reason"], "finishedAt": finished.isoformat()}
            phase, state = "Failed" if code else "Succeeded", {"terminated": terminated}
        container = self.body["spec"]["containers"][0]
        status = {"name": container["name"], "image": container["image"], "imageID": "", "ready": True}
        statuses = [{**status, "restartCount": 0, "state": state}]
        return {**self.body, "status": {"phase": phase, "containerStatuses": statuses}}

    def kill(self) -> None:
        assert self.runtime is not None
        self.runtime("StopContainer", container_id=self.container, timeout=0)

    def evict(self) -> None:
        """Stops it with a grace period, as a kubelet does that evicts it."""
        assert self.runtime is not None
        self.runtime("StopContainer", container_id=self.container, timeout=30)

    def cut(self) -> None:
        """Cuts the attached connection."""
        assert self.connection is not None
        self.connection.shutdown(socket.SHUT_RDWR)


@dataclass
class Containers(Cluster):
    """A cluster whose pods are containers; ``runtime`` must be set before the first one."""

    runtime: Runtime | None = None
    memory: int = 0  # memory limit of a container in bytes; 0: none
    removals: list[threading.Thread] = field(default_factory=list)

    def create(self, body: dict[str, Any]) -> dict[str, Any]:
        assert self.runtime is not None
        self.created.append(body)
        name, spec = body["metadata"]["name"], body["spec"]["containers"][0]
        network = {"network": OF_THE_NODE, "pid": OF_THE_CONTAINER}
        config = {
            "metadata": {"name": name, "uid": name, "namespace": "lab"},
            "log_directory": str(self.folder),
            "linux": {"security_context": {"namespace_options": network}},
        }
        sandbox = self.runtime("RunPodSandbox", config=config)["pod_sandbox_id"]
        container = {
            "metadata": {"name": spec["name"]},
            "image": {"image": IMAGE},
            "command": spec["command"],
            "envs": [{"key": key, "value": value} for key, value in variables(spec).items()],
            "mounts": [
                {"container_path": str(entry), "host_path": str(entry), "readonly": entry.name != "tmp"}
                for entry in sorted(Path("/").iterdir())
                if entry.is_dir() and not entry.is_symlink() and entry.name not in OWN
            ],
            "log_path": f"{name}.log",
            "stdin": spec.get("stdin", False),
            "stdin_once": spec.get("stdinOnce", False),
            "linux": {
                "resources": {"memory_limit_in_bytes": self.memory},
                "security_context": {"namespace_options": network},
            },
        }
        container_id = self.runtime(
            "CreateContainer", pod_sandbox_id=sandbox, config=container, sandbox_config=config
        )["container_id"]
        self.pods[name] = ContainerPod(
            body,
            None,
            self.folder / f"{name}.log",
            runtime=self.runtime,
            sandbox=sandbox,
            container=container_id,
        )
        self.runtime("StartContainer", container_id=container_id)
        return body

    def attach(self, pod: Pod, connection: socket.socket, request: bytes) -> None:
        """Proxies the connection to the runtime's own server, as API servers and kubelets do."""
        assert isinstance(pod, ContainerPod) and self.runtime is not None
        pod.connection = connection
        url = self.runtime("Attach", container_id=pod.container, stdin=True, stdout=True, stderr=True)["url"]
        host, _, path = url.removeprefix("http://").partition("/")
        address, _, port = host.rpartition(":")
        upstream = socket.create_connection((address, int(port)))
        _, _, rest = request.partition(b"\r\n")
        upstream.sendall(b"GET /" + path.encode() + b" HTTP/1.1\r\n" + rest)
        back = threading.Thread(target=pump, args=(upstream, connection), daemon=True)
        back.start()
        pump(connection, upstream, pod)
        back.join()

    def delete(self, name: str) -> bool:
        """Starts removing the pod; it is gone once its thread in ``removals`` has ended."""
        pod = self.pods.pop(name, None)
        if not isinstance(pod, ContainerPod):
            return False
        self.removals.append(threading.Thread(target=self._remove, args=(pod,)))
        self.removals[-1].start()
        return True

    def _remove(self, pod: ContainerPod) -> None:
        assert self.runtime is not None
        grace = pod.body["spec"].get("terminationGracePeriodSeconds", 30)
        self.runtime("StopContainer", container_id=pod.container, timeout=grace)
        self.runtime("StopPodSandbox", pod_sandbox_id=pod.sandbox)
        self.runtime("RemovePodSandbox", pod_sandbox_id=pod.sandbox)


def variables(container: Mapping[str, Any]) -> dict[str, str]:
    """A container's environment; the image includes textalign."""
    own = {"PATH": os.environ["PATH"], "PYTHONPATH": str(PROJECT)}
    return own | {variable["name"]: variable["value"] for variable in container["env"]}


def pump(source: socket.socket, sink: socket.socket, pod: ContainerPod | None = None) -> None:
    """Copies data until either end is closed, then shuts down both."""
    with suppress(OSError):
        while data := source.recv(2**16):
            sink.sendall(data)
            if pod is not None:
                pod.passed += 1
    for end in (source, sink):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
