"""Snapshots: a training that was interrupted goes on to the bytes of one that was left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import training.state.snapshots
from resources.compute.processes import Supervised
from resources.launchers.launcher import Acceleration, accelerate_command, accelerate_env
from tests.training.test_train import ADAPTIVE, ONE, ROOT, by_hand, done
from tests.training.tiny import make_rows, write_job
from training.state.snapshot_folder import SnapshotName, kept, names, publish
from training.train import main

ALWAYS = 1e-9  # minutes: after every step
PATIENCE = 120.0  # seconds


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """Trainings in this process take signals for themselves."""
    before = {number: signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Killed(BaseException):
    """Nobody catches it."""


def keep(job: dict[str, Any], minutes: float = ALWAYS) -> Path:
    """Has the job leave snapshots; their folder."""
    folder = Path(job["out"]).parent / "snapshots"
    job["snapshots"] = str(folder)
    job["training"]["snapshot_minutes"] = minutes
    return folder


def written(job: dict[str, Any]) -> dict[str, bytes]:
    """What a training leaves, but for seconds and the like."""
    out = Path(job["out"])
    facts = {
        name: done(job)[name] for name in ("steps", "losses", "final_loss", "tokens", "coefficients", "rows")
    }
    beside = Path(job["beside"]) if job.get("beside") else None
    files = [*out.glob("*.safetensors"), *(beside.rglob("*.safetensors") if beside else ())]
    return {path.name: path.read_bytes() for path in files} | {"facts": json.dumps(facts).encode()}


def killed_after(snapshots: int, job: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trains in this process, up to some snapshot."""
    taken: list[SnapshotName] = []

    def counted(place: Path, draft: Path, name: SnapshotName) -> None:
        publish(place, draft, name)
        taken.append(name)
        if len(taken) == snapshots:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(training.state.snapshots, "publish", counted)
        with pytest.raises(Killed):
            main([str(write_job(folder, job))])


def start(command: list[str], settings: Acceleration, folder: Path, grace: float = 0.0) -> Supervised:
    """A training that goes on while the test does something to it.

    Args:
        grace: seconds between SIGTERM and SIGKILL.
    """
    env = {**accelerate_env(settings), "PYTHONPATH": str(ROOT)}
    with (folder / "log").open("ab") as log:
        return Supervised(command, env=env, grace=grace, cwd=folder, stdout=log, stderr=log)


def until(condition: Callable[[], Any], process: Supervised, folder: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process.process.poll() is not None or time.monotonic() > deadline:
            pytest.fail((folder / "log").read_text()[-3000:])
        time.sleep(0.005)


def killed_once_kept(command: list[str], settings: Acceleration, job: dict[str, Any]) -> int:
    """Trains, and kills all its processes once there is a new snapshot; the step of the newest one."""
    folder, snapshots = Path(job["out"]).parent, Path(job["snapshots"])
    before = names(snapshots)
    for _ in range(5):
        process = start(command, settings, folder)
        until(lambda: names(snapshots) != before, process, folder)
        process.stop()
        if not (folder / "out" / "done.json").exists():
            return names(snapshots)[-1].step
        # A busy machine has let it finish before it could be killed.
        shutil.rmtree(snapshots)
        shutil.rmtree(folder / "out")
    raise AssertionError("it was always too late")


VARIED: dict[str, dict[str, Any]] = {
    "plain": {},
    "adapted": {"objective": ADAPTIVE, "schedule": "cosine", "warmup_ratio": 0.5},
    "adapters": {"lora": {"rank": 4, "dropout": 0.3}},
    "8bit": {"optimizer": "adamw_8bit"},
    "packed": {"packing": True, "gradient_checkpointing": True},
    "carried": {"optimizer_state": "carried"},
}


@pytest.mark.parametrize("how", VARIED)
def test_going_on_twice_gives_the_same_bytes(
    how: str, tmp_path: Path, job: dict[str, Any], policy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "8bit":
        pytest.importorskip("bitsandbytes", reason="the extra `8bit` is not installed")
    job |= {"reference": str(policy), "special_tokens": ["<|best|>"], "beside": str(tmp_path / "beside")}
    job["training"] |= VARIED[how]
    assert main([str(write_job(tmp_path, job))]) == 0
    alone = written(job)
    assert done(job)["resumed_at"] == [] and done(job)["earlier_seconds"] == 0
    shutil.rmtree(job["out"])
    shutil.rmtree(job["beside"], ignore_errors=True)

    snapshots = keep(job)
    killed_after(3, job, tmp_path, monkeypatch)
    assert [name.step for name in names(snapshots)] == [3]  # older ones are gone
    killed_after(4, job, tmp_path, monkeypatch)
    assert kept(snapshots) == "; step 7 is kept, and the next run resumes from there"
    assert main([str(write_job(tmp_path, job))]) == 0
    assert written(job) == alone
    facts = done(job)
    assert facts["resumed_at"] == [3, 7] and 0 < facts["earlier_seconds"] < facts["seconds"]["train"]


def test_a_carried_adapter_is_carried_on(
    tmp_path: Path, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    job |= {"beside": str(tmp_path / "first"), "special_tokens": ["<|best|>"]}
    job["training"] |= {"lora": {"rank": 4, "dropout": 0.3, "adapter": "carried"}}
    assert main([str(write_job(tmp_path, job))]) == 0
    job |= {"adapter": str(tmp_path / "first" / "adapter"), "beside": str(tmp_path / "second"), "seed": 7}
    assert main([str(write_job(tmp_path, job))]) == 0
    alone = written(job)
    shutil.rmtree(job["beside"])
    keep(job)
    killed_after(5, job, tmp_path, monkeypatch)
    assert main([str(write_job(tmp_path, job))]) == 0
    assert done(job)["resumed_at"] == [5] and written(job) == alone


def test_two_processes_that_were_told_to_end_and_killed_go_on(tmp_path: Path, job: dict[str, Any]) -> None:
    two = Acceleration(processes=2, cpu=True, threads=1)
    make_rows(21).write_parquet(tmp_path / "rows.parquet")
    job |= {"world_size": 2}
    # Dropout: each process has generators of its own.
    job["training"] |= {"batch_size": 2, "epochs": 40, "lora": {"rank": 4, "dropout": 0.3}}
    assert by_hand(two, write_job(tmp_path, job)).returncode == 0
    alone = written(job)
    shutil.rmtree(job["out"])

    snapshots = keep(job, minutes=1000)
    path = write_job(tmp_path, job)
    command = [*accelerate_command(two), "training.train", str(path)]
    process = start(command, two, tmp_path, grace=PATIENCE)
    until(lambda: "step 1/" in (tmp_path / "log").read_text(), process, tmp_path)
    process.stop()
    (told,) = names(snapshots)
    assert "the training was stopped by SIGTERM" in (tmp_path / "log").read_text()

    keep(job)
    write_job(tmp_path, job)
    killed = killed_once_kept(command, two, job)
    result = by_hand(two, path)
    assert result.returncode == 0, result.stderr
    assert f"resuming from the snapshot of step {killed}" in result.stderr
    assert done(job)["resumed_at"] == [told.step, killed] and told.step < killed < 120
    assert written(job) == alone


def test_a_signal_asks_for_a_snapshot(tmp_path: Path, job: dict[str, Any]) -> None:
    snapshots = keep(job, minutes=1000)
    job["training"] |= {"epochs": 4000}
    process = start([sys.executable, "-m", "training.train", str(write_job(tmp_path, job))], ONE, tmp_path)
    try:
        until(lambda: "step 1/" in (tmp_path / "log").read_text(), process, tmp_path)
        assert names(snapshots) == []
        (supervised,) = (
            Path(f"/proc/{process.process.pid}/task/{process.process.pid}/children").read_text().split()
        )
        os.kill(int(supervised), signal.SIGUSR1)
        until(lambda: names(snapshots), process, tmp_path)
    finally:
        process.stop()
    assert names(snapshots)[0].step >= 1


def test_only_a_snapshot_of_the_same_training_is_gone_on_from(
    tmp_path: Path, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshots = keep(job)
    killed_after(2, job, tmp_path, monkeypatch)
    (first,) = names(snapshots)
    other = job | {"seed": 5}
    killed_after(2, other, tmp_path, monkeypatch)
    job["training"] |= {"gradient_checkpointing": True}  # changes nothing of what is trained
    killed_after(1, job, tmp_path, monkeypatch)
    found = names(snapshots)
    assert len({name.training for name in found}) == 2
    assert [name.step for name in names(snapshots, first.training)] == [3]
    make_rows(23).write_parquet(job["rows"])
    killed_after(1, job, tmp_path, monkeypatch)
    assert len({name.training for name in names(snapshots)}) == 3


def test_a_broken_snapshot_is_named(
    tmp_path: Path, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshots = keep(job)
    killed_after(1, job, tmp_path, monkeypatch)
    (found,) = names(snapshots)
    for name in ("weights.safetensors", "snapshot.json"):
        (snapshots / str(found) / name).write_bytes(b"{")
        assert main([str(write_job(tmp_path, job))]) == 1
        said = capsys.readouterr().err
        assert f"{found} cannot be resumed from" in said and "remove it to start over" in said
    shutil.rmtree(snapshots)
    assert main([str(write_job(tmp_path, job))]) == 0


def test_a_training_goes_on_without_snapshots_where_none_can_be_written(
    tmp_path: Path, job: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    keep(job).write_text("a file")
    assert main([str(write_job(tmp_path, job))]) == 0
    assert "no snapshot of step 1 in" in capsys.readouterr().err
    assert done(job)["steps"] == 12


def test_a_training_goes_on_where_its_folder_is_removed(
    tmp_path: Path, job: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As whoever publishes the same checkpoint does."""

    def removed(place: Path, draft: Path, name: SnapshotName) -> None:
        if name.step == 2:
            shutil.rmtree(place)
        publish(place, draft, name)

    monkeypatch.setattr(training.state.snapshots, "publish", removed)
    snapshots = keep(job)
    assert main([str(write_job(tmp_path, job))]) == 0
    assert "no snapshot of step 2 in" in capsys.readouterr().err
    assert done(job)["steps"] == 12 and [name.step for name in names(snapshots)] == [11]


def test_only_whole_snapshots_count(tmp_path: Path) -> None:
    training = "0123456789abcdef01234567"
    assert names(tmp_path / "nowhere") == [] and kept(tmp_path / "nowhere") == ""
    for step, life in ((9, 1), (10, 0)):
        (tmp_path / "draft").mkdir()
        publish(tmp_path, tmp_path / "draft", SnapshotName(step, life, training))
    (tmp_path / f".{SnapshotName(11, 0, training)}").mkdir()
    (tmp_path / "notes").mkdir()
    assert [name.step for name in names(tmp_path)] == [10]
    (tmp_path / "draft").mkdir()
    publish(tmp_path, tmp_path / "draft", SnapshotName(12, 0, training))
    assert {path.name for path in tmp_path.iterdir()} == {"notes", str(SnapshotName(12, 0, training))}
