"""`dagster dev` on the toy location, with its own home; and helpers to query it and wait."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

from tests.integration.toys import TOY
from textalign_dagster import PROJECT

LOCATION = {"repositoryLocationName": "textalign", "repositoryName": "__repository__"}
WORKSPACE = f"""
load_from:
  - python_file:
      relative_path: {PROJECT}/tests/integration/toy_location.py
      attribute: defs
      location_name: textalign
"""
T = TypeVar("T")


@dataclass
class DevServer:
    """A running `dagster dev`, queried over GraphQL as by the UI."""

    home: Path
    url: str
    process: subprocess.Popen[bytes]

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        """The data that a GraphQL query returns; its errors fail the test."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{self.url}/graphql", body, headers)
        with urllib.request.urlopen(request, timeout=30) as reply:
            answer = json.load(reply)
        assert "errors" not in answer, answer["errors"]
        return dict(answer["data"])

    def until(self, what: str, probe: Callable[[], T | None], seconds: float = 90) -> T:
        """Polls ``probe`` and returns its first true value; on timeout fails the test with the end of the log."""
        deadline = time.monotonic() + seconds
        while True:
            value = None
            with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
                value = probe()
            if value:
                return value
            if self.process.poll() is not None or time.monotonic() > deadline:
                log = (self.home / "dev.log").read_text(errors="replace")[-3000:]
                pytest.fail(f"no {what} within {seconds:.0f} s; end of its log:\n{log}")
            time.sleep(0.3)

    def runs(self, experiment: str) -> list[tuple[str, str, str]]:
        """(iteration, status, run id) of an experiment's runs, in the order they were launched."""
        query = "{runsOrError{...on Runs{results{runId status tags{key value}}}}}"
        runs = []
        for run in reversed(self.ask(query)["runsOrError"]["results"]):
            tags = {tag["key"]: tag["value"] for tag in run["tags"]}
            name, _, iteration = tags.get("dagster/partition", "").partition("|")
            if name == experiment:
                runs.append((iteration, run["status"], run["runId"]))
        return runs

    def status(self, experiment: str, iteration: str) -> str | None:
        """The status of the latest run of a cell."""
        statuses = [status for at, status, _ in self.runs(experiment) if at == iteration]
        return statuses[-1] if statuses else None

    def launch(self, experiment: str, iteration: str) -> str:
        """Launches the job on one partition, as the UI does, and returns the run's id."""
        tags = {
            "dagster/partition": f"{experiment}|{iteration}",
            "dagster/partition/experiment": experiment,
            "dagster/partition/iteration": iteration,
        }
        answer = self.ask(
            """mutation($params: ExecutionParams!) {launchRun(executionParams: $params) {
            ... on LaunchRunSuccess {run {runId}} ... on PythonError {message}}}""",
            params={
                "selector": {**LOCATION, "jobName": "iteration"},
                "runConfigData": {},
                "executionMetadata": {"tags": [{"key": k, "value": v} for k, v in tags.items()]},
            },
        )
        return str(answer["launchRun"]["run"]["runId"])

    def skipped(self, sensor: str, words: str) -> dict[str, Any] | None:
        """A recent tick of a sensor whose skip reason contains these words."""
        query = """query($at: InstigationSelector!) {instigationStateOrError(instigationSelector: $at) {
            ... on InstigationState {ticks(limit: 5) {status skipReason runIds}}}}"""
        state = self.ask(query, at={**LOCATION, "name": sensor})["instigationStateOrError"]
        return next((tick for tick in state.get("ticks", []) if words in (tick["skipReason"] or "")), None)

    def start_sensor(self, name: str) -> None:
        """Turns a sensor on."""
        query = """mutation($at: SensorSelector!) {startSensor(sensorSelector: $at) {
            __typename ... on PythonError {message}}}"""
        answer = self.ask(query, at={**LOCATION, "sensorName": name})["startSensor"]
        assert answer["__typename"] == "Sensor", answer


@contextlib.contextmanager
def running(home: Path, experiments: tuple[str, ...]) -> Iterator[DevServer]:
    """`dagster dev` in a folder, as in the checkout: DAGSTER_HOME unset, our dagster.yaml."""
    (home / "experiments").mkdir()
    for seed, name in enumerate(experiments):  # with the same seed they would share artifacts
        (home / "experiments" / f"{name}.yaml").write_text(f"{TOY}seed: {seed}\n")
    (home / "workspace.yaml").write_text(WORKSPACE)
    shutil.copy(PROJECT / "dagster.yaml", home)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    prefixes = ("DAGSTER_", "TEXTALIGN_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)} | {
        "TEXTALIGN_EXPERIMENTS": str(home / "experiments"),
        "TEXTALIGN_HOME": str(home / "state"),
        "PYTHONPATH": str(PROJECT),
        "OMP_NUM_THREADS": "1",
    }
    with (home / "dev.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "dagster", "dev", "-h", "127.0.0.1", "-p", str(port)],
            cwd=home,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=_default_signals,
        )
    server = DevServer(home, f"http://127.0.0.1:{port}", process)
    try:
        server.until("webserver", lambda: server.ask("{version}"))
        yield server
    finally:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=20)
        for pid in _processes(lambda stat: int(stat[3]) == process.pid):  # code servers linger
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()


def _default_signals() -> None:
    """A parent started in the background of a shell ignores SIGINT, and children inherit that."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _processes(chosen: Callable[[list[str]], bool]) -> list[int]:
    """Ids of the processes for whose /proc/…/stat fields, from the state on, ``chosen`` is true."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            if chosen(entry.read_text().rpartition(")")[2].split()):
                pids.append(int(entry.parent.name))
    return pids


def trainers(home: Path) -> list[int]:
    """Ids of the toy trainer's processes, identified by the home in their environment."""
    pids = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            mine = str(home).encode() in (entry / "environ").read_bytes()
            if mine and b"time.sleep(601)" in (entry / "cmdline").read_bytes():
                pids.append(int(entry.name))
    return pids
