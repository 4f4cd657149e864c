"""Workers on a real Slurm: they return what a local worker returns, and no job outlives its caller."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from resources.engines.sampler import Decoding, Request, SamplerError
from resources.engines.transformers.sampler import TransformersSampler
from resources.workers.slurm import SlurmHost
from tests.integration.conftest import Place, Ran
from tests.integration.slurm_cluster import Cluster, cluster, impossible
from tests.resources.engines import tiny_models
from tests.toy import ToyModels, textalign
from textalign_dagster import PROJECT
from textalign_dagster.settings.clusters import SlurmNode

PATIENCE = 30.0  # seconds

WARM = Decoding(temperature=1.0, max_new_tokens=16)
REQUESTS = [Request("def add(a, b):", (1, 2, 3)), Request("for name in", (4, 5))]
LONG = [Request("def", tuple(range(4000)))]


@pytest.fixture(scope="module")
def slurms() -> Iterator[Cluster]:
    reason = impossible()
    if reason is not None:
        pytest.skip(reason)
    with cluster() as slurm, pytest.MonkeyPatch.context() as patch:
        for name, value in slurm.env.items():
            patch.setenv(name, value)
        patch.setenv("SECRET_OF_A_TEST", "sk-test")
        yield slurm


def until(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny_models.save(folder, "llama")
    return folder


def remote(**settings: Any) -> TransformersSampler:
    setup = ["export FROM_SETUP='it is $HOME'"]
    return TransformersSampler(threads=1, host=SlurmHost(SlurmNode(setup=setup, **settings)))


def worker_of(slurm: Cluster) -> int:
    """The process id of the only worker on the nodes."""
    (pid,) = [
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if b"resources.engines.transformers.worker" in command_of(entry)
        and b"srun" not in command_of(entry)
        and slurm.env["SLURM_CONF"].encode() in environment_of(entry)  # other tests may run at the same time
    ]
    return pid


def command_of(entry: Path) -> bytes:
    return _read(entry / "cmdline")


def environment_of(entry: Path) -> bytes:
    return _read(entry / "environ")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_node_generates_the_same_as_this_machine(slurms: Cluster, model: Path) -> None:
    with TransformersSampler(threads=1) as local:
        expected = local.generate(model, REQUESTS, WARM)
    seen: list[tuple[int, int]] = []
    with remote() as on_node:
        assert on_node.generate(model, REQUESTS, WARM, lambda *now: seen.append(now)) == expected
        assert seen[-1] == (5, 5) and on_node.on_accelerator  # it holds a node
        environment = Path(f"/proc/{worker_of(slurms)}/environ").read_bytes()
        assert b"FROM_SETUP=it is $HOME" in environment and b"SLURM_JOB_ID" in environment
        assert b"SECRET_OF_A_TEST" not in environment
        assert len(slurms.jobs()) == 1
        with pytest.raises(SamplerError, match=r"prompt 0 has an empty prompt"):
            on_node.generate(model, [Request("", (1,))], WARM)
        assert (
            on_node.generate(model, REQUESTS, WARM) == expected and len(slurms.jobs()) == 1
        )  # the same worker
    until(lambda: not slurms.jobs())


def test_killed_worker_is_reported_and_replaced(slurms: Cluster, model: Path) -> None:
    def kill(*_: int) -> None:
        os.kill(worker_of(slurms), signal.SIGKILL)

    with remote() as on_node:
        with pytest.raises(
            SamplerError, match=r"sampling worker was killed by SIGKILL \(often for lack of memory"
        ):
            on_node.generate(model, LONG, WARM, kill)
        assert len(on_node.generate(model, REQUESTS, WARM)) == 2
    until(lambda: not slurms.jobs())


def test_interrupting_a_call_cancels_the_job(slurms: Cluster, model: Path) -> None:
    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with remote() as on_node:
        with pytest.raises(KeyboardInterrupt):
            on_node.generate(model, LONG, WARM, interrupt)
        until(lambda: not slurms.jobs())


def test_slurm_errors_are_quoted(slurms: Cluster, model: Path) -> None:
    with remote(partition="debgu") as on_node, pytest.raises(SamplerError, match="invalid partition"):
        on_node.generate(model, REQUESTS, WARM)


CALLER = """
import sys
from pathlib import Path
from tests.integration.test_slurm_workers import LONG, WARM, remote

remote().generate(Path(sys.argv[1]), LONG, WARM, lambda *now: print("progress", flush=True))
"""


def caller(model: Path) -> subprocess.Popen[str]:
    root = str(PROJECT)
    process = subprocess.Popen(
        [sys.executable, "-c", CALLER, str(model)],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "progress\n"
    return process


def test_killed_caller_leaves_no_job(slurms: Cluster, model: Path) -> None:
    process = caller(model)
    process.kill()
    process.wait()
    until(lambda: not slurms.jobs())


def test_job_of_a_caller_killed_with_srun_is_cancelled_by_the_next_worker(
    slurms: Cluster, model: Path
) -> None:
    process = caller(model)
    (srun,) = {
        os.getpgid(int(entry.name))
        for entry in Path("/proc").glob("[0-9]*")
        if command_of(entry).startswith(b"srun\0") and f"-{process.pid}-".encode() in command_of(entry)
    }
    os.kill(process.pid, signal.SIGSTOP)  # so that it cannot cancel the job itself
    os.killpg(srun, signal.SIGKILL)
    process.kill()
    process.wait()
    assert slurms.jobs()  # the node stays allocated
    with remote() as on_node:
        assert len(on_node.generate(model, REQUESTS, WARM)) == 2
        until(lambda: len(slurms.jobs()) == 1)
    until(lambda: not slurms.jobs())


def test_loop_with_sampling_and_scoring_on_nodes(
    slurms: Cluster, ran: Ran, place: Place, toy_models: ToyModels
) -> None:
    """The samples equal those of this machine, and artifacts do not depend on where an engine ran."""
    settings = {
        "sampling.launcher": "slurm",
        "evaluation.scorer.name": "classifier",
        "evaluation.scorer.model": toy_models.classifier,
        "evaluation.scorer.label": 0,
        "evaluation.scorer.good": "false",
        "evaluation.scorer.launcher": "slurm",
    }
    arguments = [argument for name, value in settings.items() for argument in ("--set", f"{name}={value}")]
    env = {**place.env, **slurms.env}
    checked = textalign("validate", "toy", *arguments, env=env).stdout
    assert "sampling: slurm: 1 of 2 nodes of partition debug" in checked
    textalign("run", "toy", "--iterations=1", "--no-control", *arguments, env=env)
    name = next(cell for cell in place.store.cells()["experiment"].unique() if cell.startswith("toy+"))
    local, on_nodes = ran.artifact("toy", 1, "generations"), place.artifact(name, 1, "generations")
    assert on_nodes.key == local.key and on_nodes.frame("generations").equals(local.frame("generations"))
    scores = place.frame(name, 1, "evaluation", "scores")
    assert scores.filter(metric="score")["value"].null_count() == 0
    jobs = slurms.run("scontrol", "show", "jobs", "-o").splitlines()
    workers = [job for job in jobs if "JobName=textalign-worker-" in job]
    assert len(workers) >= 2  # an engine and a scorer
    until(lambda: not slurms.jobs())
