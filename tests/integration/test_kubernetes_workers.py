"""Workers in pods, over the wire: the client and the workers are real, the server is a fake and its pods are
local processes, so none of this was tested on Kubernetes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from resources.compute.pods import check_folders, version
from resources.engines.sampler import Decoding, Request, SamplerError
from resources.engines.transformers.sampler import TransformersSampler
from resources.rewards.scoring import ScoringError, score_samples
from resources.workers import kubernetes_relay, pod_entry
from resources.workers.channel import Channel
from resources.workers.kubernetes import MACHINE, PROCESS, KubernetesHost, machine, process, worker_pod
from tests.integration.conftest import Place, Ran
from tests.integration.fake_kubernetes import Attached, Cluster, fake_kubernetes
from tests.resources.engines import tiny_models
from tests.toy import PROJECT, ToyModels, textalign
from textalign_dagster.scorers import ClassifierScorer
from textalign_dagster.settings import SettingsError, validate
from textalign_dagster.settings.kubernetes import KubernetesPod
from textalign_dagster.settings.sampling import Sampling

pytest.importorskip("kubernetes", reason="needs the extra `k8s`")
pytest.importorskip("websockets", reason="the server's end of attached connections")

pytestmark = pytest.mark.usefixtures("quick")

PATIENCE = 60.0  # seconds

WARM = Decoding(temperature=1.0, max_new_tokens=16)
REQUESTS = [Request("def add(a, b):", (1, 2, 3)), Request("for name in", (4, 5))]
LONG = [Request("def", tuple(range(4000)))]

ECHO = """
import json, os, signal, sys
print(json.dumps({"ready": {}}), flush=True)
for line in sys.stdin:
    call = json.loads(line)
    if call == "fail":
        print("what it says at last", file=sys.stderr, flush=True)
        sys.exit(3)
    print(json.dumps({"result": [len(call), call[::-1]]}), flush=True)
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    with fake_kubernetes(tmp_path) as fake:
        monkeypatch.setenv("KUBECONFIG", str(fake.kubeconfig))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        monkeypatch.setenv("SECRET_OF_A_TEST", "sk-test")
        # The client decides where to look when it is imported.
        monkeypatch.setattr(
            "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(fake.kubeconfig)
        )
        yield fake


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_models.save(folder, "llama")
    return folder


def settings(**overrides: Any) -> KubernetesPod:
    defaults = {"image": "textalign:1", "python": sys.executable, "namespace": "lab", "volume_claim": "data"}
    return KubernetesPod(**{**defaults, "mount_path": "/", **overrides})


def remote(patience: float = 60.0, **overrides: Any) -> TransformersSampler:
    return TransformersSampler(threads=1, host=KubernetesHost(settings(**overrides), patience))


class Echo(KubernetesHost):
    """A worker that replies with its input reversed, and starts immediately."""

    def start(self, command: list[str], environment: Any) -> Any:
        return super().start([command[0], "-c", ECHO], environment)


def echo(patience: float = 60.0, **overrides: Any) -> Channel:
    return Channel("unused", {}, error=SamplerError, what="echo", host=Echo(settings(**overrides), patience))


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def kill_pod(fake: Cluster) -> None:
    ((_, pod),) = fake.pods.items()
    assert pod.process is not None
    os.killpg(pod.process.pid, signal.SIGKILL)


def test_pod_generates_the_same_as_this_machine(cluster: Cluster, model: Path) -> None:
    with TransformersSampler(threads=1) as local:
        expected = local.generate(model, REQUESTS, WARM)
    seen: list[tuple[int, int]] = []
    with remote(cpu="1", gpus=2, memory="8Gi", env_from_secrets=["hub"]) as in_pod:
        assert in_pod.generate(model, REQUESTS, WARM, lambda *now: seen.append(now)) == expected
        assert seen[-1] == (5, 5) and in_pod.on_accelerator  # it holds a node
        with pytest.raises(SamplerError, match=r"prompt 0 has an empty prompt"):
            in_pod.generate(model, [Request("", (1,))], WARM)
        assert in_pod.generate(model, REQUESTS, WARM) == expected and len(cluster.created) == 1

        with pytest.raises(SamplerError) as killed:
            in_pod.generate(model, LONG, WARM, lambda *_: kill_pod(cluster))
        words = "sampling worker was killed by SIGKILL (often for lack of memory); its last output: "
        assert words in str(killed.value)
        assert "Failed, OOMKilled, exit code 137; it had less memory than it needs: raise k8s.memory" in str(
            killed.value
        )
        assert in_pod.generate(model, REQUESTS, WARM) == expected  # in a new pod

        def interrupt(*_: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            in_pod.generate(model, LONG, WARM, interrupt)
        assert cluster.pods == {}
    body = cluster.created[0]
    assert "sk-test" not in json.dumps(body)
    labels, (container,) = body["metadata"]["labels"], body["spec"]["containers"]
    assert labels == {MACHINE: machine(), PROCESS: process(os.getpid())}
    assert container["stdin"] and container["stdinOnce"] and body["spec"]["restartPolicy"] == "Never"
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "2", "memory": "8Gi"}
    assert container["envFrom"] == [{"secretRef": {"name": "hub"}}]
    assert {"name": "HF_HUB_OFFLINE", "value": "1"} in container["env"]
    assert "PYTHONPATH" not in {variable["name"] for variable in container["env"]}  # the image has its own
    validator = pytest.importorskip("kubernetes_validate")
    validator.validate(body, validator.latest_version(), strict=True)


def test_scoring_in_a_pod(cluster: Cluster, toy_models: ToyModels) -> None:
    samples = pl.DataFrame(
        {
            "sample_id": ["a", "b"],
            "prompt": ["def f(x):", "for"],
            "reference": pl.Series([None, None], dtype=pl.String),
            "text": [" return x", " x in y"],
            "finish_reason": ["stop", "stop"],
        }
    )

    def scored(**where: Any) -> pl.DataFrame:
        scorer = ClassifierScorer(model=str(toy_models.classifier), label=0, good=False, **where)
        return score_samples(scorer, samples, lambda *_: None)

    where = {"launcher": "k8s", "k8s": settings()}
    kinds = [ClassifierScorer(model="some/model", label=0, good=True, **given) for given in ({}, where)]
    assert kinds[0].identity == kinds[1].identity  # where it runs does not affect scores
    local = scored()
    assert local["score"].null_count() == 0
    assert scored(**where).equals(local)
    assert len(cluster.created) == 1 and cluster.pods == {}
    cluster.quota = True
    with pytest.raises(
        ScoringError, match=r"refuses a pod in namespace lab \(HTTP 403\).*exceeded quota: gpus"
    ):
        scored(**where)


@pytest.mark.parametrize("protocols", [("v5.channel.k8s.io",), ("v4.channel.k8s.io",)])
def test_long_lines_are_sent_in_chunks(cluster: Cluster, protocols: tuple[str, ...]) -> None:
    cluster.protocols = protocols
    long = "ä€𝄞x" * 1_000_000
    channel = echo()
    assert channel.call(long) == [len(long), long[::-1]]  # type: ignore[arg-type]
    assert max(cluster.sent) <= kubernetes_relay.CHUNK
    assert channel.call("short") == [5, "trohs"]  # type: ignore[arg-type]
    started = time.monotonic()
    channel.close()
    assert cluster.pods == {} and time.monotonic() - started < 5


def test_how_a_worker_ended_is_reported(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    def check(message: str) -> None:
        channel = echo(patience=2)
        assert channel.call("x")[0] == 1  # type: ignore[arg-type]
        ends[message]()
        with pytest.raises(SamplerError, match=message):
            channel.call("fail" if message.startswith("echo ended") else "x")  # type: ignore[arg-type]
        assert cluster.pods == {}

    def cut() -> None:
        (pod,) = cluster.pods.values()
        assert isinstance(pod.attached, Attached)
        pod.attached.cut()

    def preempt() -> None:
        (pod,) = cluster.pods.values()
        pod.disrupted = "Preempted in order to admit critical pod"
        kill_pod(cluster)

    ends: dict[str, Callable[[], object]] = {
        r"echo ended with exit code 3; its last output: what it says at last\n"
        r"pod textalign-worker-\w+: Failed, Error, exit code 3$": lambda: None,
        r"the connection to pod \S+ was lost, and the worker ended with it": cut,
        r"pod \S+ is gone: it was deleted, or its node was lost": lambda: cluster.delete(*cluster.pods),
        r"pod \S+ was deleted \(Preempted in order to admit critical pod\)": preempt,
    }
    for message in ends:
        check(message)


def test_pod_that_cannot_start_reports_why(cluster: Cluster, tmp_path: Path) -> None:
    def error_message(**overrides: Any) -> str:
        with pytest.raises(SamplerError) as error:
            echo(patience=0.5, **overrides).call("x")  # type: ignore[arg-type]
        assert cluster.pods == {}
        return str(error.value)

    assert 'cannot start: ErrImagePull: image "never/ErrImagePull": not found' in error_message(
        image="never/ErrImagePull"
    )
    missing = 'never/0/3_nodes_are_available:_persistentvolumeclaim_"data"_not_found.'
    assert 'cannot start: 0/3 nodes are available: persistentvolumeclaim "data" not found.' in error_message(
        image=missing
    )
    # Whether it ends before or after the connection is established varies.
    assert "Failed, Error, exit code 1" in error_message(python="/bin/false")
    cluster.may_attach = False
    assert "the user of the kubeconfig needs permission to get and create pods/attach" in error_message()
    cluster.kubeconfig.unlink()
    assert "the Kubernetes cluster cannot be reached" in error_message()


def test_pod_waits_for_a_node_until_the_caller_closes(cluster: Cluster) -> None:
    body = worker_pod(settings(image="never/0/3_nodes_are_available:_3_Insufficient_cpu."), "waits", [], {})
    arguments = {"k8s": settings().model_dump(), "patience": 0.1, "pod": body}
    relay = subprocess.Popen(
        [sys.executable, "-m", "resources.workers.kubernetes_relay", json.dumps(arguments)],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
    )
    status_request = "GET /api/v1/namespaces/lab/pods/waits"
    until(lambda: cluster.calls.count(status_request) > 2)  # more often than for a real error
    assert relay.poll() is None and relay.stdin is not None
    relay.stdin.close()
    assert relay.wait(PATIENCE) == 0 and cluster.pods == {}


def test_an_image_with_other_versions_is_refused(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pod_entry, "installed", lambda name: "1.2.3" if name == "transformers" else None)
    with pytest.raises(
        SamplerError,
        match=r"the image has transformers \S+ and not 1\.2\.3, unlike the environment where Dagster",
    ):
        echo().call("x")  # type: ignore[arg-type]


CALLER = f"""
import sys
from resources.workers.kubernetes import KubernetesHost
from resources.workers.channel import Channel
from textalign_dagster.settings.kubernetes import KubernetesPod

class Echo(KubernetesHost):
    def start(self, command, environment):
        return super().start([command[0], "-c", {ECHO!r}], environment)

settings = KubernetesPod.model_validate_json(sys.argv[1])
channel = Channel("unused", {{}}, error=RuntimeError, host=Echo(settings))
channel.call("x")
print("called", flush=True)
sys.stdin.read()
"""


def caller() -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", CALLER, settings().model_dump_json()],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "called\n"
    return child


def test_killed_caller_leaves_no_pod(cluster: Cluster) -> None:
    killed = caller()
    assert len(cluster.pods) == 1
    killed.kill()
    killed.wait()
    until(lambda: not cluster.pods)


def test_pod_of_a_caller_killed_with_its_relay_is_deleted_by_the_next_worker(cluster: Cluster) -> None:
    killed, other = caller(), caller()
    first, second = cluster.pods
    (relay,) = {
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if f'"name": "{first}"'.encode() in command_of(entry)
    }
    os.kill(killed.pid, signal.SIGSTOP)  # so that it cannot delete the pod itself
    os.kill(relay, signal.SIGKILL)
    killed.kill()
    killed.wait()
    until(lambda: not cluster.pods[first].runs)  # its stdin was closed: it no longer holds a node
    assert cluster.pods[first].described()["status"]["phase"] == "Succeeded"
    channel = echo()
    assert channel.call("x")[0] == 1  # type: ignore[arg-type]
    assert first not in cluster.pods and cluster.pods[second].runs and len(cluster.pods) == 2
    channel.close()
    other.kill()
    other.wait()
    until(lambda: not cluster.pods)


def command_of(entry: Path) -> bytes:
    try:
        return (entry / "cmdline").read_bytes()
    except OSError:
        return b""


def test_ended_pods_of_other_machines_are_deleted(cluster: Cluster) -> None:
    for name, code in (("over", "pass"), ("wanted", "import sys; sys.stdin.read()")):
        body = worker_pod(settings(), name, [], {})
        body["metadata"]["labels"][MACHINE] = "another"
        body["spec"]["containers"][0]["command"] = [sys.executable, "-c", code]
        cluster.create(body)
    until(lambda: not cluster.pods["over"].runs)
    channel = echo()
    assert channel.call("x")[0] == 1  # type: ignore[arg-type]
    channel.close()
    assert list(cluster.pods) == ["wanted"]


def test_unused_pod_ends() -> None:
    entry = Path(pod_entry.__file__).read_text(encoding="utf-8")
    messages = {
        entry.replace("ALONE = 600.0", "ALONE = 0.1"): "this pod was not used",
        entry: "is gone; it ends",
    }
    for text, message in messages.items():
        pod = subprocess.Popen(
            [sys.executable, "-P", "-c", text, "{}", "false"],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if text == entry:
            assert pod.stdin is not None
            pod.stdin.close()
        assert pod.wait(PATIENCE) == 1 and pod.stderr is not None and message in pod.stderr.read()


def test_settings(tmp_path: Path, cluster: Cluster) -> None:
    assert [KubernetesHost(settings(cpu=cpu)).cpus for cpu in (None, "8", "500m", "2500m", "1.5")] == [
        None,
        8,
        1,
        2,
        1,
    ]
    for wrong in ({"volume_claim": "data"}, {"image": "x"}):
        with pytest.raises(
            SettingsError, match=r"k8s\.(image|volume_claim): missing; launcher: k8s needs it"
        ):
            validate(Sampling, {"launcher": "k8s", "k8s": wrong}, "here")
        with pytest.raises(ValueError, match=r"k8s\.(image|volume_claim): missing"):
            ClassifierScorer(
                model="some/model", label=0, good=True, launcher="k8s", k8s=KubernetesPod(**wrong)
            )  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match=r"scorer.k8s.mount_path: /models is not below /data"):
        check_folders(settings(mount_path="/data"), [Path("/data/models"), Path("/models")], "scorer")
    assert version(settings()).startswith("v0-of-a-test at http://127.0.0.1:")
    cluster.kubeconfig.unlink()
    with pytest.raises(SettingsError, match="no cluster is configured"):
        version(settings())


def test_loop_with_sampling_in_pods(cluster: Cluster, ran: Ran, place: Place) -> None:
    k8s = {"image": "textalign:1", "volume_claim": "data", "python": sys.executable}
    options = {"launcher": "k8s", **{f"k8s.{name}": value for name, value in k8s.items()}}
    arguments = [
        argument for name, value in options.items() for argument in ("--set", f"sampling.{name}={value}")
    ]
    env = {**place.env, "KUBECONFIG": str(cluster.kubeconfig)}
    refused = textalign("validate", "toy", *arguments, env=env, ok=False)
    assert f"sampling.k8s.mount_path: {place.home}/store is not below /data" in " ".join(
        refused.stderr.split()
    )
    arguments += ["--set", f"sampling.k8s.mount_path={place.home}"]
    checked = textalign("validate", "toy", *arguments, env=env).stdout
    assert "sampling: kubernetes: namespace default, image textalign:1" in checked
    textalign("run", "toy", "--iterations=1", "--no-control", *arguments, env=env)
    name = next(cell for cell in place.store.cells()["experiment"].unique() if cell.startswith("toy+"))
    local, in_pods = ran.artifact("toy", 1, "generations"), place.artifact(name, 1, "generations")
    assert in_pods.key == local.key and in_pods.frame("generations").equals(local.frame("generations"))
    assert cluster.created and cluster.pods == {}
