"""The Batch API: every call is sent once, whatever is interrupted; replies become ordinary rows of the ledger."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai", reason="needs the extra `judges`")

from resources.judges import batch_jobs
from resources.judges.batch import collect_all
from resources.judges.batch_jobs import Endpoint, jobs
from resources.judges.client import Call, Tally, judge_calls
from resources.judges.errors import BatchPendingError, BudgetExceededError, JudgeStoppedError
from resources.judges.ledger import Ledger
from resources.store import ArtifactStore
from tests.resources.judges.batch_endpoint import KEY, BatchEndpoint
from textalign_dagster.progress import shown_by
from textalign_dagster.settings.judge import Judge

PRICES = {"input": 2.0, "output": 10.0, "as_of": "2026-01-31"}
USD = (1000 * 2.0 + 100 * 10.0) / 1e6 / 2  # per call, at half the price


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[BatchEndpoint]:
    monkeypatch.setenv("BATCH_KEY", KEY)
    server = BatchEndpoint(lambda question: f"re: {question}", ends=False).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def judge(endpoint: BatchEndpoint, **changes: Any) -> Judge:
    settings: dict[str, Any] = {
        "model": "m-1",
        "base_url": endpoint.url,
        "api_key_env": "BATCH_KEY",
        "template": "rating",
        "ask": "rating",
        "prices": PRICES,
        "batch": {"poll_s": 0.01},
    }
    return Judge.model_validate({**settings, **changes})


def questions(*texts: str) -> list[Call]:
    return [Call([{"role": "user", "content": text}], purpose="exp|001") for text in texts]


def ask(store: ArtifactStore, settings: Judge, *texts: str, **options: Any) -> list[Any]:
    with Ledger(store) as ledger:
        return judge_calls(questions(*texts), settings, ledger, **options)


def test_sent_once_and_collected(store: ArtifactStore, endpoint: BatchEndpoint) -> None:
    settings = judge(endpoint)
    for _ in range(3):  # no matter how often it runs in the meantime
        with pytest.raises(BatchPendingError, match=r"2 calls are with the Batch API .*batch_0") as pending:
            ask(store, settings, "a", "b", "a")
    assert list(pending.value.jobs) == [job.name for job in jobs(store.storage)]
    assert set(endpoint.taken.values()) == {1}
    endpoint.end()
    tally = Tally()
    replies = ask(store, settings, "a", "b", "a", tally=tally)
    assert [reply.text for reply in replies] == ["re: a", "re: b", "re: a"]
    assert tally.usd == pytest.approx(2 * USD)
    with Ledger(store) as ledger:
        rows = ledger.rows([reply.call_key for reply in replies])
    assert rows.height == 2
    assert set(rows["status"]) == {"ok"}
    assert rows["usd"].to_list() == pytest.approx([USD, USD])
    assert set(rows["purpose"]) == {"exp|001"}
    assert jobs(store.storage) == []  # collected
    assert all(reply.from_ledger for reply in ask(store, settings, "a", "b"))
    assert set(endpoint.taken.values()) == {1}


def test_a_live_judge_reuses_batch_replies(store: ArtifactStore, endpoint: BatchEndpoint) -> None:
    endpoint.ends = True
    ask(store, judge(endpoint), "a")
    (reply,) = ask(store, judge(endpoint, batch=None), "a")
    assert (reply.text, reply.from_ledger) == ("re: a", True)


def test_the_command_line_waits_for_the_batch(store: ArtifactStore, endpoint: BatchEndpoint) -> None:
    notes: list[str] = []

    def progress(done: int, total: int, note: str) -> None:
        notes.append(f"{done}/{total} {note}")
        if len(notes) == 3:
            endpoint.end()

    with shown_by(lambda _: None):
        replies = ask(store, judge(endpoint), "a", "b", progress=progress)
    assert [reply.text for reply in replies] == ["re: a", "re: b"]
    assert "0/2 1 of 1 batches in progress" in notes
    assert notes[-1].startswith("2/2")


def test_killed_between_sending_and_recording_the_batch(
    store: ArtifactStore, endpoint: BatchEndpoint
) -> None:
    settings = judge(endpoint)
    endpoint.lost_answers = 1  # the batch exists at the endpoint, but its id is not known here
    with pytest.raises(JudgeStoppedError):
        ask(store, settings, "a", "b")
    (job,) = jobs(store.storage)
    assert (job.state, job.id) == ("intended", None)
    with pytest.raises(BatchPendingError):
        ask(store, settings, "a", "b")
    assert set(endpoint.taken.values()) == {1}
    endpoint.end()
    assert [reply.text for reply in ask(store, settings, "a", "b")] == ["re: a", "re: b"]


def test_killed_before_sending(
    store: ArtifactStore, endpoint: BatchEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def killed(*_: Any) -> Any:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(Endpoint, "submit", killed)
        with pytest.raises(Killed):
            ask(store, judge(endpoint), "a")
    assert endpoint.taken == {}
    with pytest.raises(BatchPendingError):
        ask(store, judge(endpoint), "a")
    assert list(endpoint.taken.values()) == [1]


def test_failed_calls_have_no_value_and_are_retried_only_on_request(
    store: ArtifactStore, endpoint: BatchEndpoint
) -> None:
    settings = judge(endpoint)
    endpoint.fails, endpoint.forgets = {"b"}, {"c"}
    with pytest.raises(BatchPendingError):
        ask(store, settings, "a", "b", "c")
    endpoint.end()
    good, bad, forgotten = ask(store, settings, "a", "b", "c")
    assert (good.status, bad.status, forgotten.status) == ("ok", "failed", "failed")
    assert bad.text is None
    assert bad.error == "HTTP 400: bad request with [key]"
    assert "batch_0 is completed" in forgotten.error
    endpoint.fails, endpoint.forgets = set(), set()
    again = ask(store, settings, "a", "b", "c")
    assert [reply.error for reply in again] == [None, bad.error, forgotten.error]
    assert all(reply.from_ledger for reply in again) and len(endpoint.batches) == 1
    start = datetime.now(UTC)
    for _ in range(2):
        with pytest.raises(BatchPendingError, match="2 calls are with"):
            ask(store, settings, "a", "b", "c", retry_before=start)
    endpoint.end()
    replies = ask(store, settings, "a", "b", "c", retry_before=start)
    assert [reply.text for reply in replies] == ["re: a", "re: b", "re: c"]
    assert sorted(endpoint.taken.values()) == [1, 2, 2] and jobs(store.storage) == []


def test_failed_calls_collected_by_the_sensor_are_retried_on_request(
    store: ArtifactStore, endpoint: BatchEndpoint
) -> None:
    settings = judge(endpoint)
    endpoint.fails = {"b"}
    with pytest.raises(BatchPendingError):
        ask(store, settings, "a", "b")
    endpoint.end()
    with Ledger(store) as ledger:
        collect_all(ledger)
    endpoint.fails = set()
    with pytest.raises(BatchPendingError, match="1 calls are with"):
        ask(store, settings, "a", "b", retry_before=datetime.now(UTC))
    endpoint.end()
    assert [reply.text for reply in ask(store, settings, "a", "b")] == ["re: a", "re: b"]
    assert jobs(store.storage) == []


@pytest.mark.parametrize("gone", ["batch", "file"])
def test_a_batch_that_the_endpoint_no_longer_has(
    store: ArtifactStore, endpoint: BatchEndpoint, gone: str
) -> None:
    with pytest.raises(BatchPendingError):
        ask(store, judge(endpoint), "a")
    endpoint.end()
    if gone == "batch":
        endpoint.batches.clear()
    else:
        del endpoint.files[endpoint.batches["batch_0"]["output_file_id"]]
    (reply,) = ask(store, judge(endpoint), "a")
    assert reply.status == "failed" and "no longer has the batch batch_0" in str(reply.error)


def test_a_damaged_line_fails_only_its_call(store: ArtifactStore, endpoint: BatchEndpoint) -> None:
    with pytest.raises(BatchPendingError):
        ask(store, judge(endpoint), "a", "b")
    endpoint.end()
    name = endpoint.batches["batch_0"]["output_file_id"]
    first, second = endpoint.files[name].splitlines()
    bad = [b"[]", b"1", b'{"custom_id": 7}', b'{"custom_id": "x", "response": [], "error": "e"}', first[:-20]]
    endpoint.files[name] = b"\n".join([*bad, second])
    replies = ask(store, judge(endpoint), "a", "b")
    assert sorted(reply.status for reply in replies) == ["failed", "ok"]


def test_an_expired_batch_fails_its_calls(store: ArtifactStore, endpoint: BatchEndpoint) -> None:
    with pytest.raises(BatchPendingError):
        ask(store, judge(endpoint), "a")
    endpoint.end("expired")
    (reply,) = ask(store, judge(endpoint), "a")
    assert (reply.status, reply.error) == ("failed", "the batch batch_0 is expired")


def test_the_sensor_collects_batches_for_later_runs(store: ArtifactStore, endpoint: BatchEndpoint) -> None:
    with pytest.raises(BatchPendingError):
        ask(store, judge(endpoint), "a", "b")
    with Ledger(store) as ledger:
        (job,), problems = collect_all(ledger)
    assert (job.state, job.purpose, problems) == ("open", "exp|001", [])
    endpoint.end()
    for _ in range(2):  # collecting twice gives the same rows
        with Ledger(store) as ledger:
            (job,), problems = collect_all(ledger)
        assert (job.state, problems) == ("collected", [])
    assert [r.text for r in ask(store, judge(endpoint), "a", "b")] == ["re: a", "re: b"]
    with Ledger(store) as ledger:
        assert ledger.rows([row.call_key for row in job.asked]).height == 2


def test_the_budget_stops_before_anything_is_sent(store: ArtifactStore, endpoint: BatchEndpoint) -> None:
    with pytest.raises(BudgetExceededError, match=r"budget_usd is 0\.001"):
        ask(store, judge(endpoint, budget_usd=0.001), "a", "b")
    assert (endpoint.taken, jobs(store.storage)) == ({}, [])


def test_several_batches(
    store: ArtifactStore, endpoint: BatchEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint.ends = True
    settings = judge(endpoint, batch={"requests": 2, "poll_s": 0.01})
    texts = list("abcde")
    assert [r.text for r in ask(store, settings, *texts)] == [f"re: {t}" for t in texts]
    assert len(endpoint.batches) == 3
    monkeypatch.setattr(batch_jobs, "LARGEST", 1)
    assert len(ask(store, settings, "f", "g")) == 2
    assert len(endpoint.batches) == 5


def test_the_api_key_is_not_written_to_disk(
    store: ArtifactStore, endpoint: BatchEndpoint, tmp_path: Path
) -> None:
    with pytest.raises(BatchPendingError):
        ask(store, judge(endpoint), "a")
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path
