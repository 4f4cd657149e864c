"""Workers on a real Slurm: what they say is what a worker here says, and no job outlives its caller."""

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
    why = impossible()
    if why is not None:
        pytest.skip(why)
    with cluster() as found, pytest.MonkeyPatch.context() as patch:
        for name, value in found.env.items():
            patch.setenv(name, value)
        patch.setenv("SECRET_OF_A_TEST", "sk-test")
        yield found


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


def worker_of(found: Cluster) -> int:
    """The process id of the one worker there is on the nodes."""
    (pid,) = [
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if b"resources.engines.transformers.worker" in command_of(entry)
        and b"srun" not in command_of(entry)
        and found.env["SLURM_CONF"].encode() in environment_of(entry)  # others test at the same time
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


def test_a_node_says_what_this_machine_says(slurms: Cluster, model: Path) -> None:
    with TransformersSampler(threads=1) as here:
        expected = here.generate(model, REQUESTS, WARM)
    seen: list[tuple[int, int]] = []
    with remote() as there:
        assert there.generate(model, REQUESTS, WARM, lambda *now: seen.append(now)) == expected
        assert seen[-1] == (5, 5) and there.on_accelerator  # it holds a node
        environment = Path(f"/proc/{worker_of(slurms)}/environ").read_bytes()
        assert b"FROM_SETUP=it is $HOME" in environment and b"SLURM_JOB_ID" in environment
        assert b"SECRET_OF_A_TEST" not in environment
        assert len(slurms.jobs()) == 1
        with pytest.raises(SamplerError, match=r"prompt 0 has an empty prompt"):
            there.generate(model, [Request("", (1,))], WARM)
        assert (
            there.generate(model, REQUESTS, WARM) == expected and len(slurms.jobs()) == 1
        )  # the same worker
    until(lambda: not slurms.jobs())


def test_a_worker_that_is_killed_there_is_told_here_and_replaced(slurms: Cluster, model: Path) -> None:
    def kill(*_: int) -> None:
        os.kill(worker_of(slurms), signal.SIGKILL)

    with remote() as there:
        with pytest.raises(
            SamplerError, match=r"sampling worker was killed by SIGKILL \(often for lack of memory"
        ):
            there.generate(model, LONG, WARM, kill)
        assert len(there.generate(model, REQUESTS, WARM)) == 2
    until(lambda: not slurms.jobs())


def test_what_interrupts_a_call_cancels_the_job(slurms: Cluster, model: Path) -> None:
    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    with remote() as there:
        with pytest.raises(KeyboardInterrupt):
            there.generate(model, LONG, WARM, interrupt)
        until(lambda: not slurms.jobs())


def test_slurm_that_refuses_is_quoted(slurms: Cluster, model: Path) -> None:
    with remote(partition="debgu") as there, pytest.raises(SamplerError, match="invalid partition"):
        there.generate(model, REQUESTS, WARM)


CALLER = """
import sys
from pathlib import Path
from tests.integration.test_slurm_workers import LONG, WARM, remote

remote().generate(Path(sys.argv[1]), LONG, WARM, lambda *now: print("progress", flush=True))
"""


def caller(model: Path) -> subprocess.Popen[str]:
    root = str(PROJECT)
    found = subprocess.Popen(
        [sys.executable, "-c", CALLER, str(model)],
        env={**os.environ, "PYTHONPATH": root},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert found.stdout is not None and found.stdout.readline() == "progress\n"
    return found


def test_a_caller_that_is_killed_leaves_no_job(slurms: Cluster, model: Path) -> None:
    process = caller(model)
    process.kill()
    process.wait()
    until(lambda: not slurms.jobs())


def test_who_is_killed_together_with_srun_is_cleaned_up_after(slurms: Cluster, model: Path) -> None:
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
    assert slurms.jobs()  # Slurm keeps the node
    with remote() as there:
        assert len(there.generate(model, REQUESTS, WARM)) == 2
        until(lambda: len(slurms.jobs()) == 1)
    until(lambda: not slurms.jobs())


def test_a_loop_that_samples_and_scores_on_nodes(
    slurms: Cluster, ran: Ran, place: Place, toy_models: ToyModels
) -> None:
    """The samples are those of this machine, and artifacts do not depend on where an engine ran."""
    settings = {
        "sampling.launcher": "slurm",
        "evaluation.scorer.name": "classifier",
        "evaluation.scorer.model": toy_models.classifier,
        "evaluation.scorer.label": 0,
        "evaluation.scorer.good": "false",
        "evaluation.scorer.launcher": "slurm",
    }
    words = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    env = {**place.env, **slurms.env}
    checked = textalign("validate", "toy", *words, env=env).stdout
    assert "sampling: slurm: 1 of 2 nodes of partition debug" in checked
    textalign("run", "toy", "--iterations=1", "--no-control", *words, env=env)
    name = next(cell for cell in place.store.cells()["experiment"].unique() if cell.startswith("toy+"))
    here, there = ran.artifact("toy", 1, "generations"), place.artifact(name, 1, "generations")
    assert there.key == here.key and there.frame("generations").equals(here.frame("generations"))
    scores = place.frame(name, 1, "evaluation", "scores")
    assert scores.filter(metric="score")["value"].null_count() == 0
    jobs = slurms.run("scontrol", "show", "jobs", "-o").splitlines()
    workers = [job for job in jobs if "JobName=textalign-worker-" in job]
    assert len(workers) >= 2  # an engine and a scorer
    until(lambda: not slurms.jobs())
