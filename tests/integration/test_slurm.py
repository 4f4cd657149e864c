"""Trainings on a real Slurm of two nodes: ends are what they are, and nobody trains twice.

Two nodes on one machine: no network between them, no GPU, no shared disk but this machine's own.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from resources.compute import slurm
from resources.launchers.launcher import (
    HEAD,
    NODE,
    PORT,
    Acceleration,
    Launched,
    Work,
    accelerate_env,
)
from resources.launchers.slurm import SlurmLauncher
from tests import forked
from tests.integration.conftest import Place
from tests.integration.slurm_cluster import Cluster, cluster, impossible
from tests.toy import PROJECT, textalign
from tests.training.tiny import write_training
from textalign_dagster.experiment.files import Library
from textalign_dagster.settings import SettingsError
from textalign_dagster.settings.clusters import Slurm
from training.state.snapshot_folder import names

PATIENCE = 180.0  # seconds
DEPLOY = PROJECT / "deploy" / "slurm"

# A trainer on two nodes that learns nothing: node 0 speaks, and both do what the test asks for.
TRAINER = """
import json, os, pathlib, signal, sys, time
from dagster_pipes import open_dagster_pipes

what, node, head, port, gate = *sys.argv[1:5], pathlib.Path(sys.argv[5])
life = int(pathlib.Path.cwd().name)

def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)

assert head == "127.0.0.1" and 20000 <= int(port) < 40000 and os.environ["FROM_TEST"] == "it's $HOME"
assert os.environ["FROM_SETUP"] == "yes" and "SECRET_OF_A_TEST" not in os.environ
(gate / f"started_{node}_{life}").touch()
if node == "1":
    if what == "exit":
        sys.exit(3)
    if what == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    until((gate / "go").exists)
    sys.exit(0)
with open_dagster_pipes() as context:
    context.report_custom_message({"progress": {"done": 1, "total": 2, "life": life}})
    if what == "bad input":
        raise type("JobError", (Exception,), {})("rows: no such file")
    until((gate / "go").exists)
    context.report_custom_message({"progress": {"done": 2, "total": 2, "life": life}})
    if what != "silent":
        pathlib.Path("model").mkdir()
        pathlib.Path("model/weights").write_text("of life %d" % life)
        pathlib.Path("model/done.json").write_text(json.dumps({"steps": 2, "job": pathlib.Path(sys.argv[6]).read_text()}))
print("the trainer's last line", flush=True)
"""


@pytest.fixture(scope="module")
def slurms() -> Iterator[Cluster]:
    why = impossible()
    if why is not None:
        pytest.skip(why)
    with ExitStack() as stack:
        try:
            found = stack.enter_context(cluster())
        except RuntimeError as error:
            pytest.skip(f"Slurm cannot be started here: {error}")
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in found.env.items():
            patch.setenv(name, value)
        patch.setenv("SECRET_OF_A_TEST", "sk-test")
        yield found


WORKERS: list[forked.Popen] = []


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a failed test leaves behind would fail the next one, too."""
    yield
    while WORKERS:
        WORKERS.pop(0).stop()
    if "slurms" in request.fixturenames:
        found = request.getfixturevalue("slurms")
        if jobs := found.jobs():
            found.run("scancel", *jobs)
            until(lambda: not found.jobs(), "cleaning up")


def launcher(folder: Path, **options: Any) -> SlurmLauncher:
    settings = Slurm(nodes=2, setup=["export FROM_SETUP=yes"])
    return SlurmLauncher(
        settings, "key", "toy|001", folder / "slurm", **{"every": 0.5, "settling": 20.0, **options}
    )


def train(
    folder: Path,
    what: str = "train",
    *,
    heard: Callable[[dict[str, Any]], None] = lambda _: None,
    instance: dg.DagsterInstance | None = None,
    write: Callable[[Callable[[str], Path]], list[str]] | None = None,
    env: dict[str, str] | None = None,
    **options: Any,
) -> Launched:
    """A training inside a step of an asset; raises what the step raises.

    Args:
        write: writes the job and gives the command; None: those of the trainer above.
    """
    (folder / "trainer.py").write_text(TRAINER)
    found: list[Launched] = []

    def toy(place: Callable[[str], Path]) -> list[str]:
        told = place("job") / "job.json"
        told.write_text(json.dumps({"out": str(place("model")), "rows": str(place("job") / "rows")}))
        command = [sys.executable, str(folder / "trainer.py"), what, NODE, HEAD, PORT, str(folder)]
        return [*command, str(told)]

    def place(name: str) -> Path:
        (folder / "draft" / name).mkdir(parents=True, exist_ok=True)
        return folder / "draft" / name

    @dg.asset
    def checkpoint(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        found.append(
            launcher(folder, **options).train(
                context,
                Work(
                    folder=place,
                    unfinished=folder / "unfinished",
                    write=write or toy,
                    extras={"cell": "toy|001"},
                    env={"FROM_TEST": "it's $HOME", **(env or {})},
                    on_progress=heard,
                    log=folder / "train.log",
                ),
            )
        )
        return dg.MaterializeResult()

    dg.materialize([checkpoint], instance=instance)
    return found[0]


def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"in vain: {what}"
        time.sleep(0.05)


def worker(folder: Path, how: str = "", history: str = "instance") -> forked.Popen:
    """A Dagster process with a training run (`slurm_run.py`)."""
    (folder / history).mkdir(exist_ok=True)
    command = ["python", "-m", "tests.integration.slurm_run", how, str(folder), history]
    with (folder / "worker.err").open("a") as err, Path(os.devnull).open("w") as out:
        process = forked.Popen(command, env=os.environ, stdout=out, stderr=err)
    WORKERS.append(process)
    return process


def training(folder: Path, life: int = 0) -> None:
    """Waits until both nodes are training."""
    until(
        lambda: (folder / f"started_0_{life}").exists() and (folder / f"started_1_{life}").exists(),
        "training",
    )


def submissions(folder: Path) -> int:
    return len(list((folder / "slurm").glob("*/*/submission.json")))


def test_two_nodes_train_and_one_speaks(tmp_path: Path, slurms: Cluster) -> None:
    seen: list[int] = []

    def heard(values: dict[str, Any]) -> None:
        seen.append(values["done"])
        (tmp_path / "go").touch()  # the trainer waits for it: progress is heard while it runs

    launched = train(tmp_path, heard=heard)
    assert seen == [1, 2] and launched.done is not None and launched.done["steps"] == 2
    assert launched.seconds >= 0 and slurms.jobs() == []
    assert (tmp_path / "started_1_0").exists()
    # The trainer worked in folders of its own, and what it read names the folder in which it is now.
    draft = tmp_path / "draft"
    assert json.loads(launched.done["job"])["out"] == "model"
    assert json.loads((draft / "job" / "job.json").read_text())["rows"] == str(draft / "job" / "rows")
    assert (draft / "model" / "weights").read_text() == "of life 0"
    assert "the trainer's last line" in (tmp_path / "train.log").read_text()
    # Until they are safe elsewhere the results stay; a second run takes them without a job.
    (tmp_path / "draft" / "model" / "weights").unlink()
    assert train(tmp_path).done == launched.done and slurms.jobs() == []
    assert (draft / "model" / "weights").read_text() == "of life 0" and submissions(tmp_path) == 1
    launcher(tmp_path).forget()
    assert list((tmp_path / "slurm").iterdir()) == []


@pytest.mark.parametrize(
    "what, words",
    {
        "exit": r"Slurm job \d+ failed on node n2: exit code 3; see the log",
        "kill": r"failed on node n2: a process was killed by signal 9 \(out of memory\?\)",
        "silent": r"ended with exit code 0, but the trainer did not report that it is done",
        "bad input": r"JobError: rows: no such file \(Slurm job \d+: FAILED",
    }.items(),
)
def test_an_end_is_what_it_is(tmp_path: Path, slurms: Cluster, what: str, words: str) -> None:
    if what in ("silent",):
        (tmp_path / "go").touch()
    with pytest.raises(dg.Failure, match=words) as failure:
        train(tmp_path, what, settling=1.0)
    assert failure.value.allow_retries == (what != "bad input")
    assert "end of log" in failure.value.metadata
    # What failed is tried again, not taken for what is there.
    (tmp_path / "go").touch()
    assert train(tmp_path).done is not None
    assert submissions(tmp_path) == 1  # the failed one's files are gone


def test_a_cancelled_run_ends_its_job(tmp_path: Path, slurms: Cluster) -> None:
    process = worker(tmp_path)
    training(tmp_path)
    # As the UI does it: the state first, then the signal.
    with dg.DagsterInstance.local_temp(str(tmp_path / "instance")) as instance:
        instance.report_run_canceling(instance.get_runs()[0])
        os.kill(process.pid, signal.SIGINT)
        process.wait(PATIENCE)
    assert slurms.jobs() == []


def test_ctrl_c_ends_the_job(tmp_path: Path, slurms: Cluster) -> None:
    process = worker(tmp_path, "with somebody waiting")
    training(tmp_path)
    os.kill(process.pid, signal.SIGINT)
    process.wait(PATIENCE)
    assert slurms.jobs() == []


def test_whoever_comes_next_goes_on_with_the_job(tmp_path: Path, slurms: Cluster) -> None:
    killed = worker(tmp_path, "dies after sbatch")
    assert killed.wait(PATIENCE) == -signal.SIGKILL
    training(tmp_path)
    (job,) = slurms.jobs()

    restarted = worker(tmp_path)
    until(
        lambda: (
            (tmp_path / "train.log").exists() or b"continuing with" in (tmp_path / "worker.err").read_bytes()
        ),
        "it",
    )
    os.kill(restarted.pid, signal.SIGTERM)  # as a redeployment does it
    restarted.wait(PATIENCE)
    assert slurms.jobs() == [job]
    assert "leaving the Slurm job running" in (tmp_path / "worker.err").read_text()

    seen: list[int] = []

    def heard(values: dict[str, Any]) -> None:
        seen.append(values["done"])
        (tmp_path / "go").touch()

    assert train(tmp_path, heard=heard).done is not None
    assert seen == [1, 2]  # from the beginning
    assert submissions(tmp_path) == 1 and slurms.jobs() == []


def test_of_two_at_a_time_one_submits(tmp_path: Path, slurms: Cluster) -> None:
    both = [worker(tmp_path, history=name) for name in ("one", "two")]  # SQLite is not begun by two at a time
    until(lambda: (tmp_path / "worker.err").read_bytes().count(b": RUNNING") == 2, "both")
    assert len(slurms.jobs()) == 1 and submissions(tmp_path) == 1
    (tmp_path / "go").touch()
    assert [process.wait(PATIENCE) for process in both] == [0, 0]


def test_a_requeued_training_goes_on_from_its_snapshot(tmp_path: Path, slurms: Cluster) -> None:
    """The real trainer, on two nodes: warned as before a time limit, and then requeued."""
    acceleration = Acceleration(processes=2, machines=2, cpu=True, threads=1)
    kept: list[int] = []

    def command(place: Callable[[str], Path]) -> list[str]:
        return write_training(tmp_path, place, acceleration, epochs=200, batch_size=4, snapshot_minutes=1000)

    def heard(values: dict[str, Any]) -> None:
        if kept:
            return
        snapshots = launcher(tmp_path).folder / "snapshots"
        (job,) = slurms.jobs()
        slurms.run("scancel", "--signal=USR1", job)
        until(lambda: names(snapshots), "a snapshot")
        kept.append(names(snapshots)[0].step)
        slurms.run("scontrol", "requeue", job)
        until(lambda: slurms.run("squeue", "--noheader", "--format=%r").strip() == "BeginTime", "requeued")
        slurms.run("scontrol", "update", f"jobid={job}", "StartTime=now+2")

    launched = train(tmp_path, heard=heard, write=command, env=accelerate_env(acceleration))
    assert launched.done is not None
    (resumed_at,) = launched.done["resumed_at"]
    assert kept[0] <= resumed_at < 600 == launched.done["steps"]  # it was told to end, too
    assert submissions(tmp_path) == 1


def test_a_requeued_job_has_a_folder_of_its_own(tmp_path: Path, slurms: Cluster) -> None:
    seen: list[tuple[int, int]] = []

    def heard(values: dict[str, Any]) -> None:
        seen.append((values["life"], values["done"]))
        if values["life"] == 1:
            (tmp_path / "go").touch()
            return
        training(tmp_path)
        (job,) = slurms.jobs()
        slurms.run("scontrol", "requeue", job)
        until(lambda: slurms.run("squeue", "--noheader", "--format=%r").strip() == "BeginTime", "requeued")
        # Slurm would wait for two minutes; its keys for a job's start are as coarse as a second.
        slurms.run("scontrol", "update", f"jobid={job}", "StartTime=now+2")

    launched = train(tmp_path, heard=heard)
    assert launched.done is not None and seen == [(0, 1), (1, 1), (1, 2)]
    assert (tmp_path / "draft" / "model" / "weights").read_text() == "of life 1"


def test_a_state_that_nobody_knows_is_no_success(
    tmp_path: Path, slurms: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = slurm.state
    monkeypatch.setattr(slurm, "state", lambda job: None)
    with pytest.raises(
        dg.Failure, match="is lost: no answer about it for 1 s; if it still runs, the next run takes it over"
    ):
        train(tmp_path, patience=1.0)
    # The job goes on, and has its own word when the scheduler has forgotten it.
    (tmp_path / "go").touch()
    assert train(tmp_path).done is not None
    monkeypatch.setattr(slurm, "state", ask)
    until(lambda: slurms.jobs() == [], "the end")
    assert submissions(tmp_path) == 1


def test_a_job_that_slurm_holds_though_it_has_finished(
    tmp_path: Path, slurms: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a controller does that crashed when the job had just begun."""
    (tmp_path / "go").touch()
    held = slurm.State("PENDING", "launch failed requeued held")
    monkeypatch.setattr(slurm, "state", lambda job: held)
    assert train(tmp_path, settling=1.0).done is not None


def test_what_cannot_be_is_said_before_anything_starts(
    tmp_path: Path, slurms: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert slurm.check_slurm(Slurm(nodes=2)) == "slurm: 2 of 2 nodes of partition debug"
    with pytest.raises(
        SettingsError, match=r"partition: no 'debgu' here; one of debug \(did you mean 'debug'\?\)"
    ):
        slurm.check_slurm(Slurm(partition="debgu"))
    with pytest.raises(SettingsError, match=r"nodes: 3, but partition debug has 2; lower it"):
        slurm.check_slurm(Slurm(nodes=3))
    with pytest.raises(
        SettingsError, match=r"sbatch refused the job: Batch job submission failed: Invalid feature"
    ):
        slurm.submit("textalign-x", ["--constraint=gold"], _script(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SettingsError, match=r"slurm needs sbatch, .* on the PATH"):
        slurm.check_slurm(Slurm())


def _script(folder: Path) -> Path:
    path = folder / "job.sh"
    path.write_text("#!/bin/bash\ntrue\n")
    return path


def test_validate_asks_the_cluster(slurms: Cluster, place: Place) -> None:
    def validate(nodes: int, **options: Any) -> subprocess.CompletedProcess[str]:
        arguments = [
            f"training.slurm.nodes={nodes}",
            f"training.processes={nodes}",
            "training.launcher=slurm",
        ]
        words = [word for argument in arguments for word in ("--set", argument)]
        return textalign("validate", "toy", *words, env={**place.env, **slurms.env}, **options)

    assert "slurm: 2 of 2 nodes of partition debug" in validate(2).stdout
    assert "training.slurm.nodes: 3, but partition debug has 2; lower it" in validate(3, ok=False).stderr


def test_the_loop_trains_on_two_nodes(slurms: Cluster, place: Place) -> None:
    settings = {
        "training.launcher": "slurm",
        "training.slurm.nodes": 2,
        "training.processes": 2,
        "training.batch_size": 1,
    }
    # The instance that deploy/ has for a login node.
    instance = place.folder / "instance"
    instance.mkdir()
    shutil.copy(DEPLOY / "dagster.yaml", instance)
    env = {
        **place.env,
        **slurms.env,
        "DAGSTER_HOME": str(instance),
        "TEXTALIGN_DAGSTER_STORAGE": str(place.folder / "local"),
    }
    arguments = [word for name, value in settings.items() for word in ("--set", f"{name}={value}")]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "textalign_dagster.cli.main",
            "run",
            "toy",
            "--iterations=1",
            "--no-control",
            *arguments,
        ],
        env=env,
        cwd=PROJECT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (manifest,) = (place.home / "store" / "artifacts" / "checkpoint").glob("*/manifest.json")
    facts = json.loads(manifest.read_text())
    folder = manifest.parent / facts["attempt"]
    trained = json.loads((folder / "model" / "done.json").read_text())
    assert trained["world_size"] == 2 and trained["steps"] == 4
    assert json.loads((folder / "job" / "job.json").read_text())["rows"] == str(
        folder / "job" / "rows.parquet"
    )
    assert list((place.home / "slurm").glob("textalign-*")) == []  # published, so forgotten
    assert (place.folder / "local" / "runs.db").exists() or list((place.folder / "local").rglob("runs.db"))


def test_what_deploy_has_for_a_cluster(tmp_path: Path) -> None:
    training = Library((DEPLOY, PROJECT / "experiments")).load("my_cluster").training
    assert training.launcher == "slurm" and training.machines == 2 and training.processes == 8
    project, cluster = (
        yaml.safe_load(path.read_text(encoding="utf-8"))["concurrency"]
        for path in (PROJECT / "dagster.yaml", DEPLOY / "dagster.yaml")
    )
    assert cluster["runs"]["tag_concurrency_limits"] == project["runs"]["tag_concurrency_limits"]
    script = f"source {DEPLOY / 'environment.sh'} && env"
    done = subprocess.run(
        ["/bin/bash", "-euc", script],
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
    )
    assert f"DAGSTER_HOME={tmp_path}/textalign/dagster" in done.stdout.splitlines()
