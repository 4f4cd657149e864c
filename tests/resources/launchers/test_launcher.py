"""The launcher: live progress, accurate failures, and no process left behind."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from resources.compute import supervisor
from resources.compute.processes import Supervised
from resources.launchers.launcher import (
    Acceleration,
    Launched,
    LocalLauncher,
    accelerate_command,
    accelerate_env,
)
from resources.launchers.pipes_messages import lines_of
from textalign_dagster import PROJECT
from training.state.snapshot_folder import SnapshotName

PATIENCE = 30.0  # seconds

CHILD = """
import json, os, pathlib, subprocess, sys, time
from dagster_pipes import open_dagster_pipes

def until(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
"""

STUBBORN = """
import os, pathlib, signal, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
while True:
    time.sleep(60)
"""


def script(folder: Path, body: str, prologue: str = CHILD) -> list[str]:
    path = folder / "child.py"
    path.write_text(prologue + textwrap.dedent(body))
    return [sys.executable, str(path)]


def launch(
    command: list[str],
    *,
    on_progress: Callable[[dict[str, Any]], None] = lambda _: None,
    **options: Any,
) -> Launched:
    """Launch inside a step of an asset; raises what the step raises."""
    results: list[Launched] = []

    @dg.asset
    def checkpoint(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        results.append(
            LocalLauncher(grace=0.5).launch(
                context, command, {"k": 1}, {"FROM_TEST": "yes"}, on_progress, **options
            )
        )
        return dg.MaterializeResult()

    dg.materialize([checkpoint])
    return results[0]


def test_progress_arrives_while_the_child_runs(tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []

    def on_progress(values: dict[str, Any]) -> None:
        seen.append(values)
        (tmp_path / f"heard_{values['done']}").touch()

    command = script(
        tmp_path,
        f"""
        with open_dagster_pipes() as context:
            assert context.extras == {{"k": 1}} and os.environ["FROM_TEST"] == "yes"
            for done in (1, 2):
                context.report_custom_message({{"progress": {{"done": done, "total": 2}}}})
                until(pathlib.Path({str(tmp_path)!r}, f"heard_{{done}}").exists)
            pathlib.Path({str(tmp_path / "done.json")!r}).write_text('{{"steps": 2}}')
        """,
    )
    launched = launch(command, on_progress=on_progress, done=tmp_path / "done.json")
    assert [values["done"] for values in seen] == [1, 2]
    assert launched.done == {"steps": 2}
    assert launched.seconds > 0


def test_the_failure_is_the_childs_own_error(tmp_path: Path) -> None:
    command = script(tmp_path, "with open_dagster_pipes():\n    raise RuntimeError('CUDA out of {memory}')")
    with pytest.raises(dg.Failure) as failure:
        launch(command, log=tmp_path / "log" / "train.log")
    assert failure.value.description == "RuntimeError: CUDA out of {memory}"
    metadata = failure.value.metadata
    assert metadata["exit code"].value == 1
    assert "child.py" in metadata["command"].value
    assert "Traceback" in metadata["end of log"].value
    assert failure.value.allow_retries
    assert "RuntimeError" in (tmp_path / "log" / "train.log").read_text()


def test_a_child_that_reports_no_error(tmp_path: Path) -> None:
    with pytest.raises(dg.Failure, match="exited with 3 and reported no error"):
        launch(script(tmp_path, "sys.exit(3)"))


def test_a_child_that_is_killed(tmp_path: Path) -> None:
    with pytest.raises(dg.Failure, match=r"signal 9 \(out of memory\?\)"):
        launch(script(tmp_path, "os.kill(os.getpid(), 9)"))


def test_a_failure_names_the_step_that_is_kept(tmp_path: Path) -> None:
    name = SnapshotName(7, 0, "0123456789abcdef01234567")
    (tmp_path / "snapshots" / str(name)).mkdir(parents=True)
    for body in (
        "os.kill(os.getpid(), 9)",
        "sys.exit(3)",
        "with open_dagster_pipes():\n    raise ValueError('no')",
    ):
        with pytest.raises(dg.Failure, match="; step 7 is kept, and the next run resumes from there"):
            launch(script(tmp_path, body), unfinished=tmp_path / "snapshots")


def test_exit_code_0_alone_is_not_success(tmp_path: Path) -> None:
    (tmp_path / "done.json").write_text("{}")  # from an earlier run
    with pytest.raises(dg.Failure, match="did not finish"):
        launch(script(tmp_path, ""), done=tmp_path / "done.json")


def test_an_error_of_the_listener_is_raised_at_the_end(tmp_path: Path) -> None:
    def broken(_: dict[str, Any]) -> None:
        raise ZeroDivisionError("listener")

    command = script(
        tmp_path,
        "with open_dagster_pipes() as context:\n    context.report_custom_message({'progress': {}})",
    )
    with pytest.raises(ZeroDivisionError, match="listener"):
        launch(command, on_progress=broken)


def test_processes_left_running_by_the_child_are_ended(tmp_path: Path) -> None:
    stubborn = tmp_path / "stubborn.py"
    stubborn.write_text(STUBBORN)
    pid_file = tmp_path / "pid"
    command = script(
        tmp_path,
        f"""
        subprocess.Popen([sys.executable, {str(stubborn)!r}, {str(pid_file)!r}], start_new_session=True)
        pid = pathlib.Path({str(pid_file)!r})
        until(lambda: pid.exists() and pid.read_text())
        """,
    )
    launch(command)
    assert not alive(int(pid_file.read_text()))


DRIVER = """
import sys
import dagster as dg
from pathlib import Path
from resources.launchers.launcher import LocalLauncher

@dg.asset
def checkpoint(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
    LocalLauncher(grace=0.5).launch(context, sys.argv[1:], {}, {}, lambda values: None)
    return dg.MaterializeResult()

dg.materialize([checkpoint])
"""

# A launcher whose two workers ignore SIGINT and SIGTERM; one has its own session, like torchrun's workers.
LAUNCHER = """
import subprocess, sys
stubborn, first, second = sys.argv[1:]
subprocess.Popen([sys.executable, stubborn, first])
subprocess.Popen([sys.executable, stubborn, second], start_new_session=True).wait()
"""


def two_workers(folder: Path, pids: list[Path]) -> list[str]:
    """A command that starts two workers, which write their process ids."""
    for name, text in {"launcher.py": LAUNCHER, "stubborn.py": STUBBORN}.items():
        (folder / name).write_text(text)
    return [sys.executable, str(folder / "launcher.py"), str(folder / "stubborn.py"), *map(str, pids)]


def test_an_interrupt_waits_until_all_processes_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = [tmp_path / "first", tmp_path / "second"]
    supervised = Supervised(two_workers(tmp_path, pids), grace=0.0)
    wait_until(lambda: all(path.exists() and path.read_text() for path in pids))
    os.kill(supervised.process.pid, signal.SIGKILL)  # the supervisor: this process must end the rest
    end = supervisor.end

    def interrupted_end(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        end(*arguments)

    monkeypatch.setattr(supervisor, "end", interrupted_end)
    with pytest.raises(KeyboardInterrupt):
        supervised.stop()
    assert not any(alive(int(path.read_text())) for path in pids)


def test_no_process_is_left_if_stop_is_never_called(tmp_path: Path) -> None:
    pids = [tmp_path / "first", tmp_path / "second"]
    source = f"""
        from resources.compute.processes import Supervised
        supervised = Supervised({two_workers(tmp_path, pids)}, grace=0.0)
        pids = [pathlib.Path(path) for path in {[*map(str, pids)]}]
        until(lambda: all(path.exists() and path.read_text() for path in pids))
        os.kill(supervised.process.pid, 9)  # the supervisor
        raise KeyboardInterrupt
    """
    root = PROJECT
    subprocess.run(
        script(tmp_path, source), env={**os.environ, "PYTHONPATH": str(root)}, stderr=subprocess.DEVNULL
    )
    assert not any(alive(int(path.read_text())) for path in pids)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
@pytest.mark.parametrize("victim", ["parent", "parent and supervisor"])
def test_no_process_is_left_when_the_parent_ends(tmp_path: Path, number: signal.Signals, victim: str) -> None:
    if victim == "parent and supervisor" and number == signal.SIGKILL:
        pytest.skip("no process is left that could end the workers")
    (tmp_path / "driver.py").write_text(DRIVER)
    pids = [tmp_path / "first", tmp_path / "second"]
    root = PROJECT
    driver = subprocess.Popen(
        [sys.executable, str(tmp_path / "driver.py"), *two_workers(tmp_path, pids)],
        env={**os.environ, "PYTHONPATH": str(root), "DAGSTER_DISABLE_TELEMETRY": "1"},
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: all(path.exists() and path.read_text() for path in pids))
        workers = [int(path.read_text()) for path in pids]
        assert all(alive(pid) for pid in workers)
        if victim == "parent and supervisor":
            os.kill(children(driver.pid)[0], signal.SIGKILL)
        driver.send_signal(number)
        driver.wait(PATIENCE)
        wait_until(lambda: not any(alive(pid) for pid in workers))
        if number != signal.SIGKILL:
            assert driver.returncode != 0
    finally:
        driver.kill()
        driver.wait()
        for path in pids:
            if path.exists() and alive(int(path.read_text())):
                os.kill(int(path.read_text()), signal.SIGKILL)


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state not in "ZX"


def children(pid: int) -> list[int]:
    pids = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                pids.append(int(stat.parent.name))
        except OSError:
            continue
    return pids


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.02)


def test_accelerate_command_is_fully_specified() -> None:
    single = accelerate_command(Acceleration(cpu=True, threads=2))
    assert single[0] == sys.executable and single[-1] == "-m" and "--cpu" in single
    for option in ("--num_processes", "--num_machines", "--mixed_precision", "--dynamo_backend"):
        assert option in single
    several = accelerate_command(Acceleration(processes=2, cpu=True))
    assert "--cpu" not in several and "--multi_gpu" in several  # --cpu would start one process only
    assert accelerate_env(Acceleration(processes=2, cpu=True, threads=2))["ACCELERATE_USE_CPU"] == "true"
    assert accelerate_env(Acceleration(threads=2))["OMP_NUM_THREADS"] == "2"
    assert json.dumps(accelerate_env(Acceleration()))


def test_a_line_is_read_once_it_is_complete(tmp_path: Path) -> None:
    path, over = tmp_path / "messages", threading.Event()
    path.write_bytes(b'{"a": 1}\n{"b"')
    with path.open("ab", buffering=0) as writer:
        lines = lines_of(path, over, every=0.01)
        assert next(lines) == b'{"a": 1}\n'
        later = threading.Timer(0.1, writer.write, [b": 2}\n"])
        later.start()  # the reader has seen half a line by then
        assert next(lines) == b'{"b": 2}\n'
        later.join()
        writer.write(b'{"c": 3}\n{"torn')
        over.set()
        assert list(lines) == [b'{"c": 3}\n']
