"""What runs next, and what halts the loop: real stores and runs, toy engines."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import dagster as dg
import pytest

from resources.store import ArtifactStore
from tests.integration.toy_location import defs
from tests.integration.toys import TOY
from textalign_dagster import automation
from textalign_dagster.automation import next_cell, ready
from textalign_dagster.loop.abandoned import BATCHES_TAG, EXPERIMENT_TAG, PROCESS_TAG, process_tag
from textalign_dagster.loop.partitions import Cell

# The experiment grid is read at import time, so the toy borrows the name of a shipped experiment.
NAME = "pep8_alt_lmu"


@dataclass
class Loop:
    """A home with a toy experiment and a Dagster history."""

    home: Path
    instance: dg.DagsterInstance

    @property
    def store(self) -> ArtifactStore:
        return ArtifactStore(str(self.home / "store"))

    def configure(self, text: str = TOY) -> None:
        folder = self.home / "experiments"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{NAME}.yaml").write_text(text)

    def run(self, iteration: int) -> bool:
        """Runs an iteration and returns whether it succeeded."""
        job = defs.resolve_job_def("iteration")
        key = Cell(NAME, iteration).key
        quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
        result = job.execute_in_process(
            partition_key=key, instance=self.instance, raise_on_error=False, run_config=quiet
        )
        return result.success

    def record(self, iteration: int, status: dg.DagsterRunStatus, **tags: str) -> str:
        """Adds a run to the history."""
        keys = {"dagster/partition": str(Cell(NAME, iteration).key), EXPERIMENT_TAG: NAME}
        run = dg.DagsterRun(job_name="iteration", run_id=str(uuid4()), status=status, tags=keys | tags)
        self.instance.add_run(run)
        return run.run_id

    def sensor(self) -> list[dg.RunRequest | dg.SkipReason]:
        with dg.build_sensor_context(instance=self.instance) as context:
            return list(automation.advance(context))

    def schedule(self) -> list[dg.RunRequest | dg.SkipReason]:
        with dg.build_schedule_context(instance=self.instance) as context:
            return list(automation.next_iteration(context))

    def ready(self) -> automation.Next:
        return ready(self.instance, self.store, NAME)


@pytest.fixture
def loop(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Loop]:
    """Nothing has run yet."""
    monkeypatch.setenv("TEXTALIGN_EXPERIMENTS", str(home / "experiments"))
    monkeypatch.setattr(automation, "EXPERIMENTS", (NAME,))
    (tmp_path / "dagster").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "dagster")) as instance:
        fresh = Loop(home, instance)
        fresh.configure()
        yield fresh


@pytest.fixture(scope="module")
def first_iteration(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home in which iteration 1 has run."""
    folder = tmp_path_factory.mktemp("first") / "home"
    with pytest.MonkeyPatch.context() as patch, dg.DagsterInstance.ephemeral() as instance:
        patch.setenv("TEXTALIGN_HOME", str(folder))
        patch.setenv("TEXTALIGN_EXPERIMENTS", str(folder / "experiments"))
        fresh = Loop(folder, instance)
        fresh.configure()
        assert fresh.run(1)
        yield folder


@pytest.fixture
def after_one(loop: Loop, first_iteration: Path) -> Loop:
    """Iteration 1 has run."""
    shutil.copytree(first_iteration, loop.home, dirs_exist_ok=True)
    return loop


def requested(result: list[dg.RunRequest | dg.SkipReason]) -> list[str]:
    """The partitions of the run requests."""
    return [str(request.partition_key) for request in result if isinstance(request, dg.RunRequest)]


def skipped(result: list[dg.RunRequest | dg.SkipReason]) -> str:
    """The one skip reason."""
    [reason] = result
    assert isinstance(reason, dg.SkipReason)
    return str(reason.skip_message)


def test_first_iteration_is_started_by_hand(loop: Loop) -> None:
    waits = f"{NAME} waits for its first run (iteration 1 is started by hand)"
    assert skipped(loop.sensor()) == skipped(loop.schedule()) == waits


def test_iterations_run_in_order_until_done(after_one: Loop) -> None:
    for k in (2, 3):
        assert requested(after_one.sensor()) == requested(after_one.schedule()) == [f"{NAME}|{k:03d}"]
        assert after_one.run(k)
    assert skipped(after_one.sensor()) == skipped(after_one.schedule()) == f"{NAME} is done: 3 iterations"


@pytest.mark.parametrize("status", ["NOT_STARTED", "STARTING", "STARTED", "CANCELING"])
def test_nothing_is_requested_while_a_run_is_active(after_one: Loop, status: str) -> None:
    after_one.record(2, dg.DagsterRunStatus[status])
    assert skipped(after_one.sensor()) == skipped(after_one.schedule()) == f"{NAME} is running"


def test_runs_of_other_experiments_are_ignored(after_one: Loop) -> None:
    after_one.record(2, dg.DagsterRunStatus.STARTED, **{EXPERIMENT_TAG: "another"})
    assert requested(after_one.sensor()) == [f"{NAME}|002"]


def test_halts_on_a_failed_stage_and_continues_once_it_is_fixed(after_one: Loop) -> None:
    (after_one.home / "fail").touch()
    assert not after_one.run(2)
    assert "halts: run " in skipped(after_one.sensor())
    assert "of iteration 2 failed; fix the cause" in skipped(after_one.schedule())
    (after_one.home / "fail").unlink()
    assert after_one.run(2)
    assert requested(after_one.sensor()) == [f"{NAME}|003"]


def test_halts_on_a_cancelled_run(after_one: Loop) -> None:
    run = after_one.record(2, dg.DagsterRunStatus.CANCELED)
    assert f"halts: run {run[:8]} of iteration 2 was cancelled" in skipped(after_one.sensor())


def test_iteration_waiting_for_the_batch_api(after_one: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openai", reason="needs the extra `judges`")
    from resources.judges.client import Call, judge_calls
    from resources.judges.errors import BatchPendingError
    from resources.judges.ledger import Ledger
    from tests.resources.judges.batch_endpoint import KEY, BatchEndpoint
    from textalign_dagster.settings.judge import Judge

    def sensor() -> list[dg.RunRequest | dg.SkipReason]:
        with dg.build_sensor_context(instance=after_one.instance) as context:
            return list(automation.collect_batches(context))

    assert skipped(sensor()) == "no batch is pending"
    monkeypatch.setenv("BATCH_KEY", KEY)
    endpoint = BatchEndpoint(lambda question: "3", ends=False).start()
    settings = {"model": "m", "base_url": endpoint.url, "api_key_env": "BATCH_KEY", "template": "rating"}
    judge = Judge.model_validate(settings | {"ask": "rating", "batch": {}})
    call = Call([{"role": "user", "content": "how good?"}], purpose=f"{NAME}|002")
    with Ledger(after_one.store) as ledger, pytest.raises(BatchPendingError) as pending:
        judge_calls([call], judge, ledger)
    run = after_one.record(2, dg.DagsterRunStatus.FAILURE, **{BATCHES_TAG: " ".join(pending.value.jobs)})
    assert skipped(sensor()) == "1 batches with 1 calls are pending"
    assert "waits for the Batch API" in skipped(after_one.sensor())
    endpoint.end()
    (request,) = sensor()
    assert isinstance(request, dg.RunRequest)
    assert (str(request.partition_key), request.run_key) == (f"{NAME}|002", run)
    after_one.record(2, dg.DagsterRunStatus.STARTED)
    assert requested(sensor()) == []
    endpoint.shutdown()
    endpoint.server_close()


def test_a_failed_iteration_that_is_not_next_does_not_halt(after_one: Loop) -> None:
    after_one.record(3, dg.DagsterRunStatus.FAILURE)  # started out of order
    assert requested(after_one.sensor()) == [f"{NAME}|002"]


def test_halts_on_a_blocking_check(after_one: Loop) -> None:
    pointer = after_one.store.pointer(NAME, 1, "evaluation")
    assert pointer is not None
    after_one.store.assign(
        NAME, 1, "evaluation", pointer.artifact, settings=dict(pointer.settings), checks={"diversity": False}
    )
    reason = skipped(after_one.sensor())
    assert reason.startswith(f"{NAME} halts at iteration 1") and "failed its check diversity" in reason


def test_halts_on_a_stale_iteration(after_one: Loop) -> None:
    after_one.configure(TOY.replace("max_new_tokens: 16", "max_new_tokens: 17"))
    reason = skipped(after_one.schedule())
    assert reason.startswith(f"{NAME} halts at iteration 1") and "max_new_tokens: 16 -> 17" in reason


def test_unreadable_experiment_halts_only_itself(after_one: Loop) -> None:
    after_one.configure(TOY.replace("iterations: 3", "iteration: 3"))
    reason = skipped(after_one.sensor())
    assert reason.startswith(f"{NAME} cannot run") and "did you mean 'iterations'" in reason


def test_next_cell_does_not_need_dagster(after_one: Loop) -> None:
    assert next_cell(after_one.store, NAME).cell == Cell(NAME, 2)


def test_run_of_a_dead_process_does_not_block(after_one: Loop) -> None:
    run = str(uuid4())
    gone = process_tag(run)[PROCESS_TAG].rpartition(":")[0] + ":1"  # our pid, started long ago
    keys = {"dagster/partition": str(Cell(NAME, 2).key), EXPERIMENT_TAG: NAME, PROCESS_TAG: gone}
    started = dg.DagsterRunStatus.STARTED
    after_one.instance.add_run(dg.DagsterRun("iteration", run_id=run, status=started, tags=keys))
    assert "failed" in after_one.ready().reason
    assert after_one.instance.get_run_by_id(run).status == dg.DagsterRunStatus.FAILURE


def test_run_is_tagged_with_its_process(loop: Loop) -> None:
    assert loop.run(1)
    [run] = loop.instance.get_runs()
    assert run.tags[PROCESS_TAG] == process_tag(run.run_id)[PROCESS_TAG]


def test_a_live_process_and_an_inherited_tag_count_as_running(after_one: Loop) -> None:
    after_one.record(2, dg.DagsterRunStatus.STARTED, **process_tag("another run"))
    assert after_one.ready().reason == f"{NAME} is running"
