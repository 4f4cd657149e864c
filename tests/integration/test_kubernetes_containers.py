"""Workers in real containers: attached connections, how pods end and memory limits come from a real container
runtime; the API server and the kubelet are the test's own (see `container_runtime`)."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

pytest.importorskip("kubernetes", reason="needs the extra `k8s`")

from resources.engines.sampler import SamplerError
from resources.engines.transformers.sampler import TransformersSampler
from resources.launchers.kubernetes import KubernetesLauncher
from resources.launchers.launcher import Acceleration, Launched, Work, accelerate_env
from resources.workers.channel import Channel
from resources.workers.kubernetes import GRACE, KubernetesHost
from tests.integration import test_kubernetes_workers as wire
from tests.integration.container_runtime import (
    ContainerPod,
    Containers,
    Runtime,
    container_runtime,
    impossible,
    refusal,
)
from tests.integration.fake_kubernetes import fake_kubernetes
from tests.integration.test_kubernetes_workers import LONG, REQUESTS, WARM, echo, model, settings
from tests.training.tiny import write_training
from textalign_dagster.settings.kubernetes import Kubernetes
from training.state.snapshot_folder import names

pytestmark = pytest.mark.usefixtures("quick")

__all__ = ["model"]  # a fixture

HUNGRY = """
import sys
print('{"ready": {}}', flush=True)
for line in sys.stdin:
    taken = bytearray(600_000_000)
    print('{"result": 1}', flush=True)
"""

OFTEN = """
import sys
from resources.workers import kubernetes_relay
kubernetes_relay.IDLE_SECONDS = 0.05
sys.exit(kubernetes_relay.main())
"""


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runtime]:
    reason = impossible()
    if reason is not None:
        pytest.skip(reason)
    with container_runtime(tmp_path_factory.mktemp("runtime")) as started:
        if (reason := refusal(started)) is not None:
            pytest.skip(reason)
        yield started


@pytest.fixture
def cluster(runtime: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Containers]:
    with fake_kubernetes(tmp_path, Containers) as fake:
        fake.runtime = runtime
        monkeypatch.setenv("KUBECONFIG", str(fake.kubeconfig))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        # The client decides where to look when it is imported.
        monkeypatch.setattr(
            "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(fake.kubeconfig)
        )
        yield fake
    for removal in fake.removals:
        removal.join()


def only(cluster: Containers) -> ContainerPod:
    (pod,) = cluster.pods.values()
    assert isinstance(pod, ContainerPod)
    return pod


def test_container_generates_the_same_as_this_machine(cluster: Containers, model: Path) -> None:
    with TransformersSampler(threads=1) as local:
        expected = local.generate(model, REQUESTS, WARM)
    with TransformersSampler(threads=1, host=KubernetesHost(settings(cpu="1"))) as in_container:
        assert in_container.generate(model, REQUESTS, WARM) == expected and len(cluster.created) == 1
        with pytest.raises(SamplerError, match=r"was killed by SIGKILL .* Failed, Error, exit code 137"):
            in_container.generate(model, LONG, WARM, lambda *_: only(cluster).kill())
        assert in_container.generate(model, REQUESTS, WARM) == expected
    assert cluster.pods == {}


def test_long_lines_pass_and_a_closed_worker_ends_by_itself(cluster: Containers) -> None:
    long = "ä€𝄞x" * 500_000
    channel = echo()
    assert channel.call(long) == [len(long), long[::-1]]  # type: ignore[arg-type]
    started = time.monotonic()
    channel.close()
    assert cluster.pods == {}
    (removal,) = cluster.removals
    removal.join()  # after GRACE a container that does not end by itself is killed
    assert time.monotonic() - started < GRACE


@pytest.mark.parametrize("what", ["cut", "relay"])
def test_a_container_ends_with_its_connection(cluster: Containers, what: str) -> None:
    channel = echo(patience=5)
    assert channel.call("x")[0] == 1  # type: ignore[arg-type]
    pod = only(cluster)
    if what == "cut":
        pod.cut()
        words = "the connection to pod .* was lost, and the worker ended with it"
    else:
        assert channel.worker is not None
        os.kill(channel.worker.process.pid, signal.SIGKILL)
        wire.until(lambda: not pod.runs)  # by itself: it was not deleted
        assert pod.described()["status"]["phase"] == "Succeeded"
        words = "was killed by SIGKILL"
    with pytest.raises(SamplerError, match=words):
        channel.call("x")  # type: ignore[arg-type]
    assert cluster.pods == {}


def test_how_a_container_ended_is_reported(cluster: Containers) -> None:
    channel = echo()
    assert channel.call("x")[0] == 1  # type: ignore[arg-type]
    message = (
        r"ended with exit code 3; its last output: what it says at last\npod \S+: Failed, Error, exit code 3$"
    )
    with pytest.raises(SamplerError, match=message):
        channel.call("fail")  # type: ignore[arg-type]

    cluster.memory = 200 * 2**20
    hungry = host(lambda name, command, own: (name, command, own), HUNGRY)
    channel = Channel("unused", {}, error=SamplerError, what="hungry worker", host=hungry)
    message = r"hungry worker was killed by SIGKILL .*OOMKilled, exit code 137; .* raise k8s.memory"
    with pytest.raises(SamplerError, match=message):
        channel.call({})


def test_keepalive_messages_change_nothing(cluster: Containers) -> None:
    def often(name: str, command: list[str], own: None) -> tuple[str, list[str], None]:
        return name, [command[0], "-P", "-c", OFTEN, command[-1]], own

    channel = Channel("unused", {}, error=SamplerError, what="echo", host=host(often, wire.ECHO))
    assert channel.call("x")[0] == 1  # type: ignore[arg-type]
    before = only(cluster).passed
    wire.until(lambda: only(cluster).passed > before + 10)
    assert channel.call("abc") == [3, "cba"]  # type: ignore[arg-type]
    channel.close()


def test_evicted_training_saves_a_last_snapshot(cluster: Containers, tmp_path: Path) -> None:
    acceleration = Acceleration(cpu=True, threads=1)
    launched: list[Launched] = []

    def place(name: str) -> Path:
        (tmp_path / "draft" / name).mkdir(parents=True, exist_ok=True)
        return tmp_path / "draft" / name

    def write(place: Callable[[str], Path]) -> list[str]:
        return write_training(tmp_path, place, acceleration, epochs=600, snapshot_minutes=1000)

    def evict_once(values: dict[str, Any]) -> None:
        if not names(tmp_path / "snapshots") and values["done"] < values["total"]:
            only(cluster).evict()

    @dg.asset
    def checkpoint(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        pod = Kubernetes(
            image="textalign:1",
            python=sys.executable,
            namespace="lab",
            volume_claim="data",
            mount_path=str(tmp_path),
        )
        work = Work(
            folder=place,
            unfinished=tmp_path / "snapshots",
            write=write,
            extras={},
            env=accelerate_env(acceleration),
            on_progress=evict_once,
            log=tmp_path / "train.log",
        )
        launched.append(
            KubernetesLauncher(pod, "key", tmp_path, every=0.1, settling=20.0).train(context, work)
        )
        return dg.MaterializeResult()

    message = r"EndedError: the training was stopped by SIGTERM .*; step (\d+) is kept"
    with pytest.raises(dg.Failure, match=message) as failure:
        dg.materialize([checkpoint])
    (step,) = map(int, re.findall(message, str(failure.value.description)))
    dg.materialize([checkpoint])
    assert launched[0].done is not None and launched[0].done["resumed_at"] == [step]


def host(change: Callable[[str, list[str], None], Any], code: str) -> KubernetesHost:
    """A host whose pods run ``code``; ``change`` modifies the relay's command."""

    class Changed(KubernetesHost):
        def start(self, command: list[str], environment: Any) -> Any:
            return change(*super().start([command[0], "-c", code], environment))

    return Changed(settings())
