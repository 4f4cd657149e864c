"""The loop in a live `dagster dev`: by itself, in order, and cancelled.

The server's start takes longer than most tests, so they share one; each has an experiment of its own.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.dev_server import DevServer, running, trainers


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevServer]:
    with running(
        tmp_path_factory.mktemp("dev"), ("backfilled", "cancelled", "looping", "unordered")
    ) as found:
        yield found


def test_sensor_runs_the_iterations_in_order_and_stops(server: DevServer) -> None:
    server.start_sensor("advance")
    waits = "looping waits for its first run (iteration 1 is started by hand)"
    assert server.until("tick", lambda: server.skipped("advance", waits))["runIds"] == []
    assert server.runs("looping") == []

    server.launch("looping", "001")
    ended = ("SUCCESS", "FAILURE")
    server.until("iteration 3", lambda: server.status("looping", "003") in ended, seconds=150)
    made = [("001", "SUCCESS"), ("002", "SUCCESS"), ("003", "SUCCESS")]
    assert [(at, status) for at, status, _ in server.runs("looping")] == made
    server.until("end", lambda: server.skipped("advance", "looping is done: 3 iterations"))
    assert len(server.runs("looping")) == 3


def test_history_is_that_of_the_command_line(server: DevServer) -> None:
    # With DAGSTER_HOME unset, `dagster dev` would keep it in a folder that it deletes at its end.
    history = server.home / "state" / "dagster"
    assert (history / "history" / "runs.db").exists()
    assert any((history / "compute_logs").iterdir())


def test_iteration_out_of_order_fails_with_one_sentence(server: DevServer) -> None:
    run = server.launch("unordered", "003")
    server.until("end of the run", lambda: server.status("unordered", "003") == "FAILURE")
    query = """query($id: ID!) {logsForRun(runId: $id) {... on EventConnection {events {
        ... on ExecutionStepFailureEvent {stepKey error {message causes {message}}}}}}}"""
    events = server.ask(query, id=run)["logsForRun"]["events"]
    [failure] = [event for event in events if event.get("error")]
    assert failure["stepKey"] == "generations"
    assert failure["error"]["message"].strip().endswith("materialize iteration 2 first")
    assert failure["error"]["causes"] == []


def test_backfill_runs_in_order(server: DevServer) -> None:
    keys = [f"backfilled|{k:03d}" for k in (2, 1)]
    stages = ("evaluation", "checkpoint", "datapool", "feedback", "generations", "prompt_draws")
    answer = server.ask(
        """mutation($params: LaunchBackfillParams!) {launchPartitionBackfill(backfillParams: $params) {
        __typename ... on PythonError {message}}}""",
        params={"assetSelection": [{"path": [stage]} for stage in stages], "partitionNames": keys},
    )
    assert answer["launchPartitionBackfill"]["__typename"] == "LaunchBackfillSuccess", answer
    done = ("SUCCESS", "FAILURE")
    server.until("iteration 2", lambda: server.status("backfilled", "002") in done, seconds=150)
    made = [("001", "SUCCESS"), ("002", "SUCCESS")]
    assert [(at, status) for at, status, _ in server.runs("backfilled")] == made


def test_cancelled_run_leaves_no_trainer(server: DevServer) -> None:
    (server.home / "state" / "slow").touch()
    run = server.launch("cancelled", "001")
    server.until("trainer", lambda: len(trainers(server.home)) >= 2)
    answer = server.ask("mutation($id: String!) {terminateRun(runId: $id) {__typename}}", id=run)
    assert answer["terminateRun"]["__typename"] == "TerminateRunSuccess"
    server.until("cancellation", lambda: server.status("cancelled", "001") == "CANCELED")
    assert trainers(server.home) == []
