"""Workers on a real one-node Ray cluster: they return what a local worker returns, and none is left behind."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from resources.engines.sampler import Decoding, Request, SamplerError
from resources.engines.transformers.sampler import TransformersSampler
from resources.workers.host import RayHost, check_host
from tests.integration.conftest import Place, Ran
from tests.resources.engines import tiny_models
from tests.toy import textalign
from textalign_dagster import PROJECT
from textalign_dagster.settings.clusters import RayNode, SlurmNode
from textalign_dagster.settings.kubernetes import KubernetesPod

pytest.importorskip("ray", reason="needs Ray: pip install -e '.[ray]'")

pytestmark = pytest.mark.usefixtures("quick")

PATIENCE = 60.0  # seconds
MARK = f"TEXTALIGN_TEST_OF_RAY={os.getpid()}"  # in the environment of the cluster and all its processes
WARM = Decoding(temperature=1.0, max_new_tokens=16)
REQUESTS = [Request("def add(a, b):", (1, 2, 3)), Request("for name in", (4, 5))]
LONG = [Request("def", tuple(range(4000)))]


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a head node with two CPUs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("ray") / "head.log"
    with pytest.MonkeyPatch.context() as patch, log.open("wb") as out:
        patch.setenv(*MARK.split("="))
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        options = [
            f"--port={port}",
            "--num-cpus=2",
            "--include-dashboard=false",
            "--node-ip-address=127.0.0.1",
        ]
        head = subprocess.Popen(
            [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", *options],
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            until(lambda: head.poll() is not None or answers(port))
            assert head.poll() is None, log.read_text()
            yield f"127.0.0.1:{port}"
        finally:
            head.terminate()
            head.wait(PATIENCE)


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_models.save(folder, "llama")
    return folder


def remote(address: str, **settings: Any) -> TransformersSampler:
    return TransformersSampler(threads=1, host=RayHost(RayNode(address=address, **settings)))


def workers() -> list[int]:
    """Process ids of the workers on the node."""
    return [
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if words(entry, "cmdline")[3:4] == [b"resources.engines.transformers.worker"]
        and MARK.encode() in words(entry, "environ")  # other tests may run at the same time
    ]


def words(entry: Path, file: str) -> list[bytes]:
    try:
        return (entry / file).read_bytes().split(b"\0")
    except OSError:
        return []


def test_node_generates_the_same_as_this_machine(
    address: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_A_TEST", "sk-test")
    with TransformersSampler(threads=1) as local:
        expected = local.generate(model, REQUESTS, WARM)
    with remote(address) as on_ray:
        # It holds resources of the cluster.
        assert on_ray.generate(model, REQUESTS, WARM) == expected and on_ray.on_accelerator
        (worker,) = workers()
        environment = Path(f"/proc/{worker}/environ").read_bytes()
        assert b"RAY_" in environment and b"SECRET_OF_A_TEST" not in environment
        with pytest.raises(SamplerError, match=r"prompt 0 has an empty prompt"):
            on_ray.generate(model, [Request("", (1,))], WARM)
        assert on_ray.generate(model, REQUESTS, WARM) == expected and workers() == [worker]

        def kill(*_: int) -> None:
            os.kill(worker, signal.SIGKILL)

        with pytest.raises(SamplerError, match="was killed by SIGKILL"):
            on_ray.generate(model, LONG, WARM, kill)
        assert on_ray.generate(model, REQUESTS, WARM) == expected

        def interrupt(*_: int) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            on_ray.generate(model, LONG, WARM, interrupt)
        until(lambda: not workers())


CALLER = """
import sys
from pathlib import Path
from tests.integration.test_ray_workers import LONG, WARM, remote

remote(sys.argv[2]).generate(Path(sys.argv[1]), LONG, WARM, lambda *now: print("progress", flush=True))
"""


def test_killed_caller_leaves_no_worker(address: str, model: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", CALLER, str(model), address],
        env={**os.environ, "PYTHONPATH": str(PROJECT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "progress\n"
    assert len(workers()) == 1
    process.kill()
    process.wait()
    until(lambda: not workers())


def test_impossible_requests_are_refused(address: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with remote(address, gpus=8) as on_ray, pytest.raises(SamplerError, match=r'no node .* has .*"GPU": 8'):
        on_ray.generate(model, REQUESTS, WARM)
    assert str(check_host("ray", SlurmNode(), KubernetesPod(), "sampling")).startswith("ray 2.")
    assert check_host("local", SlurmNode(), KubernetesPod(), "sampling") is None


def test_loop_with_sampling_on_ray(address: str, ran: Ran, place: Place) -> None:
    settings = ["--set", "sampling.launcher=ray", "--set", f"sampling.ray.address={address}"]
    assert "sampling: ray 2." in textalign("validate", "toy", *settings, env=place.env).stdout
    textalign("run", "toy", "--iterations=1", "--no-control", *settings, env=place.env)
    name = next(cell for cell in place.store.cells()["experiment"].unique() if cell.startswith("toy+"))
    local, on_ray = ran.artifact("toy", 1, "generations"), place.artifact(name, 1, "generations")
    assert on_ray.key == local.key and on_ray.frame("generations").equals(local.frame("generations"))
    until(lambda: not workers())
