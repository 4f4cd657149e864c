"""Judge calls over HTTP, with every fault an endpoint can have. The endpoint's log is the ground truth."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from textalign_dagster import PROJECT

pytest.importorskip("openai", reason="judges need the extra judges")

import resources.judges.ledger_writer
from resources.judges.client import Call, Reply, RetryPolicy, Tally, judge_calls
from resources.judges.errors import BudgetExceededError, JudgeStoppedError
from resources.judges.forecast import forecast
from resources.judges.ledger import Ledger
from resources.store import ArtifactError, ArtifactStore
from tests.resources.judges import batch_process
from tests.resources.judges.fake_endpoint import Running, reply_to, running
from textalign_dagster.settings.judge import Judge, JudgeDecoding, JudgeLimits, JudgePrices

KEY = "sk-canary-7d1f0c5e9b"
QUICK = RetryPolicy(base_s=0.01, cap_s=0.05, patience_s=3, grace_s=2)
PRICES = JudgePrices(input=10.0, output=20.0, cached_input=1.0, as_of="2026-01-31")
SCHEMA = {"type": "json_schema", "json_schema": {"name": "score", "schema": {"type": "object"}}}


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    monkeypatch.setenv("CANARY_KEY", KEY)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with running(tmp_path / "requests.jsonl", latency=0.01, key=KEY) as endpoint:
        yield endpoint


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(ArtifactStore(tmp_path / "store")) as ledger:
        yield ledger


def a_judge(endpoint: Running, **settings: Any) -> Judge:
    limits = {"concurrency": 8, "timeout_s": 5.0, "attempts": 4} | settings.pop("limits", {})
    defaults = {"model": "judge-1", "template": "any", "base_url": endpoint.url, "api_key_env": "CANARY_KEY"}
    return Judge(limits=JudgeLimits(**limits), **{**defaults, **settings})


def calls_for(prompts: list[str], **more: Any) -> list[Call]:
    return [Call([{"role": "user", "content": prompt}], **more) for prompt in prompts]


def ask(prompts: list[str], judge: Judge, ledger: Ledger, **more: Any) -> list[Reply]:
    return judge_calls(calls_for(prompts), judge, ledger, policy=more.pop("policy", QUICK), **more)


def fault(kind: str, times: int = 1, **more: Any) -> str:
    order = ", ".join(f'"{k}": {v!r}'.replace("'", '"') for k, v in more.items())
    return f'FAULT{{"kind": "{kind}", "times": {times}{", " if order else ""}{order}}} for you'


def accounted(endpoint: Running, ledger: Ledger) -> bool:
    """Whether every request the endpoint received is an attempt in some row of the ledger."""
    return sum(endpoint.counts().values()) == ledger.frame()["attempts"].sum()


def test_replies_are_in_call_order_and_paid_for_once(endpoint: Running, ledger: Ledger) -> None:
    slow = [
        f'{i} FAULT{{"kind": "reply", "times": 1, "latency": {0.1 if i % 7 == 0 else 0.0}}}'
        for i in range(40)
    ]
    prompts = [*slow, *slow[:5]]  # duplicates
    seen: list[tuple[int, int]] = []
    judge = a_judge(endpoint)
    replies = ask(prompts, judge, ledger, progress=lambda done, total, note: seen.append((done, total)))
    assert [reply.text for reply in replies] == [reply_to(prompt) for prompt in prompts]
    assert set(endpoint.counts().values()) == {1} and len(endpoint.counts()) == 40
    assert seen[0] == (0, 40) and seen[-1] == (40, 40)
    assert not any(reply.from_ledger for reply in replies)
    again = ask(prompts[::-1], judge, ledger)
    assert [reply.text for reply in again] == [reply_to(prompt) for prompt in prompts[::-1]]
    assert all(reply.from_ledger for reply in again)
    assert sum(endpoint.counts().values()) == 40


def test_identical_concurrent_batches_are_paid_for_once(endpoint: Running, tmp_path: Path) -> None:
    endpoint.control(latency=0.2)
    prompts, judge = [f"same {i}" for i in range(6)], a_judge(endpoint, limits={"concurrency": 2})

    def run(_: int) -> tuple[list[Reply], list[str]]:
        notes: list[str] = []
        with Ledger(ArtifactStore(tmp_path / "store")) as ledger:
            return ask(prompts, judge, ledger, progress=lambda done, total, note: notes.append(note)), notes

    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(run, range(2)))
    assert set(endpoint.counts().values()) == {1}
    assert sorted(reply.from_ledger for replies, _ in both for reply in replies) == [False] * 6 + [True] * 6
    assert ["another process is making the same calls; waiting for it" in notes for _, notes in both].count(
        True
    ) == 1


def test_what_identifies_a_call(endpoint: Running, ledger: Ledger) -> None:
    judge = a_judge(endpoint)
    judges = [
        judge,
        judge.model_copy(update={"model": "judge-2"}),
        judge.model_copy(update={"decoding": JudgeDecoding(max_tokens=7)}),
    ]
    for variant in judges:
        ask(["same"], variant, ledger)
    judge_calls(calls_for(["same"], repeat=1), judge, ledger)
    assert endpoint.counts()["same"] == 4
    # Fields that are only recorded do not identify a call.
    judge_calls(calls_for(["same"], purpose="else", order_shown="ba"), judge, ledger)
    ask(["same"], judge.model_copy(update={"base_url": endpoint.url + "/", "prices": PRICES}), ledger)
    assert endpoint.counts()["same"] == 4


def test_concurrency_reaches_its_limit_and_never_exceeds_it(endpoint: Running, ledger: Ledger) -> None:
    endpoint.control(latency=0.05)
    ask([f"window {i}" for i in range(60)], a_judge(endpoint), ledger)
    events = sorted(
        [(line["at"], 1) for line in endpoint.lines()]
        + [(line["at"], -1) for line in endpoint.lines("answered")]
    )
    assert max(itertools.accumulate(step for _, step in events)) == 8


TRANSIENT = {
    "429": 2,
    "408": 1,
    "409": 1,
    "500": 3,
    "503": 2,
    "reset": 2,
    "truncated": 2,
    "schema": 1,
    "echo_key_500": 1,
}
LOST = ("reset", "truncated", "schema")  # the reply may have been paid for


def test_transient_faults_are_retried_and_every_request_is_accounted_for(
    endpoint: Running, ledger: Ledger
) -> None:
    faulty = {fault(kind, times): times for kind, times in TRANSIENT.items()}
    faulty[fault("truncated", 1, cut="connection")] = 1
    prompts = [*faulty, *(f"sound {i}" for i in range(20))]
    tally = Tally()
    replies = ask(prompts, a_judge(endpoint), ledger, tally=tally)
    assert [reply.text for reply in replies] == [reply_to(prompt) for prompt in prompts]
    assert endpoint.counts() == {prompt: faulty.get(prompt, 0) + 1 for prompt in prompts}
    assert [reply.attempts for reply in replies] == [faulty.get(prompt, 0) + 1 for prompt in prompts]
    assert accounted(endpoint, ledger)
    assert tally.requests == sum(endpoint.counts().values())
    assert tally.lost == ledger.frame()["lost_replies"].sum() == sum(TRANSIENT[k] for k in LOST) + 1


@pytest.mark.parametrize("kind", ["timeout", "dribble"])
def test_a_reply_that_never_ends_is_retried(endpoint: Running, ledger: Ledger, kind: str) -> None:
    judge = a_judge(endpoint, limits={"timeout_s": 0.3})
    (reply,) = ask([fault(kind)], judge, ledger)
    assert (reply.status, reply.attempts, reply.text) == ("ok", 2, reply_to(fault(kind)))
    assert ledger.frame()["lost_replies"].to_list() == [1]


def test_retry_after_pauses_all_requests(endpoint: Running, ledger: Ledger) -> None:
    prompts = [fault("429", 1, retry_after=0.5), *(f"other {i}" for i in range(300))]
    ask(prompts, a_judge(endpoint), ledger)
    refused = next(line["at"] for line in endpoint.lines("answered") if line["what"] == "429")
    later = [line["at"] - refused for line in endpoint.lines() if line["at"] > refused + 0.1]
    assert later and min(later) > 0.45
    assert accounted(endpoint, ledger)


def test_rate_limit_headers_are_heeded(endpoint: Running, ledger: Ledger) -> None:
    endpoint.control(headers={"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "300ms"})
    ask(["first", "second"], a_judge(endpoint, limits={"concurrency": 1}), ledger)
    first, second = (line["at"] for line in endpoint.lines())
    assert second - first > 0.28


def test_configured_rate_limit_is_respected(endpoint: Running, ledger: Ledger) -> None:
    judge = a_judge(endpoint, limits={"requests_per_minute": 1200, "concurrency": 64})
    started = time.monotonic()
    ask([f"limited {i}" for i in range(60)], judge, ledger)
    # Of 60 requests, 38 can go at once and the others at 19 a second: 22/19 s, more on a busy machine.
    # test_rate_limit.py is exact.
    assert time.monotonic() - started > 1.1


def test_endless_rate_limiting_stops_the_batch(endpoint: Running, ledger: Ledger) -> None:
    policy = RetryPolicy(base_s=0.01, cap_s=0.02, patience_s=0.3)
    endpoint.control(every={"kind": "429"})
    with pytest.raises(JudgeStoppedError, match=r"HTTP 429.*run again later"):
        ask(["limited"], a_judge(endpoint), ledger, policy=policy)
    endpoint.control(every={"kind": "429", "retry_after": 3600})
    with pytest.raises(JudgeStoppedError, match="another 3600 s"):
        ask(["limited"], a_judge(endpoint), ledger)
    assert accounted(endpoint, ledger)
    endpoint.control(every=None)
    assert ask(["limited"], a_judge(endpoint), ledger)[0].status == "ok"


def test_a_single_call_that_is_always_rate_limited_is_given_up(endpoint: Running, ledger: Ledger) -> None:
    prompts = [fault("429", 10**6), *(f"fine {i}" for i in range(20))]
    policy = RetryPolicy(base_s=0.01, cap_s=0.02, patience_s=0.5)
    hopeless, *fine = ask(prompts, a_judge(endpoint), ledger, policy=policy)
    assert hopeless.status == "failed" and "HTTP 429" in str(hopeless.error)
    assert {reply.status for reply in fine} == {"ok"}
    assert accounted(endpoint, ledger)


HOPELESS = (
    "500",
    "truncated",
    "reset",
    "page",
    "no_choices",
    "gzip",
    "nested",
    "wall",
    "filter",
    "400",
    "401",
)
ALWAYS = 10**6


def test_calls_that_always_fail_are_given_up_once_and_retried_only_on_request(
    endpoint: Running, ledger: Ledger
) -> None:
    prompts = [fault(kind, ALWAYS) for kind in HOPELESS] + [f"fine {i}" for i in range(20)]
    judge = a_judge(endpoint)
    before = datetime.now(UTC)
    replies = dict(zip(prompts, ask(prompts, judge, ledger), strict=True))
    for prompt, reply in replies.items():
        assert reply.status == ("ok" if prompt.startswith("fine") else "failed"), prompt
    for kind, words in (
        ("500", "HTTP 500"),
        ("truncated", "cut off"),
        ("gzip", "Decoding"),
        ("filter", "blocked"),
    ):
        reply = replies[fault(kind, ALWAYS)]
        assert (reply.text, reply.usd) == (None, None) and words in str(reply.error)
    counts = endpoint.counts()
    for kind in HOPELESS:
        sent = {"wall": 2, "401": 2, "filter": 1, "400": 1}.get(kind, 4)
        assert counts[fault(kind, ALWAYS)] == sent == replies[fault(kind, ALWAYS)].attempts, kind
    assert accounted(endpoint, ledger)

    requests = len(endpoint.lines())
    again = ask(prompts, judge, ledger)
    assert [reply.status for reply in again] == [reply.status for reply in replies.values()]
    assert [reply.error for reply in again] == [reply.error for reply in replies.values()]
    assert all(reply.from_ledger for reply in again) and len(endpoint.lines()) == requests
    ahead = forecast(calls_for(prompts), judge, ledger)
    assert (ahead.calls, ahead.cached, ahead.failed) == (0, 20, len(HOPELESS))

    # On request, only those are sent, and a probe, because nothing else can show that the endpoint is up.
    start = datetime.now(UTC)
    retried = ask(prompts, judge, ledger, retry_before=start)
    assert sum(not reply.from_ledger for reply in retried) == len(HOPELESS)
    assert [reply.status for reply in retried] == [reply.status for reply in replies.values()]
    requests = len(endpoint.lines())
    ask(prompts, judge, ledger, retry_before=start)  # in the same run, for another stage
    ask(prompts, judge, ledger, retry_before=before)
    assert len(endpoint.lines()) == requests
    assert accounted(endpoint, ledger)
    probes = ledger.frame().filter(purpose="probe")
    assert 1 <= probes.height <= 5 and set(probes["status"]) == {"ok"}


def test_a_call_given_up_earlier_can_succeed_when_retried(endpoint: Running, ledger: Ledger) -> None:
    prompts = ["fine", fault("500", 4)]
    judge = a_judge(endpoint, limits={"concurrency": 1})
    assert [reply.status for reply in ask(prompts, judge, ledger)] == ["ok", "failed"]
    assert [reply.status for reply in ask(prompts, judge, ledger)] == ["ok", "failed"]
    retried = ask(prompts, judge, ledger, retry_before=datetime.now(UTC))
    assert [reply.status for reply in retried] == ["ok", "ok"]
    assert [reply.status for reply in ask(prompts, judge, ledger)] == ["ok", "ok"]


def test_hopeless_calls_at_the_end_are_not_mistaken_for_an_outage(endpoint: Running, ledger: Ledger) -> None:
    """More than `outage_calls` of them in a row, with no other call left to send."""
    fine = [f"fine {i}" for i in range(10)]
    hopeless = [f"{i} {fault('page', ALWAYS)}" for i in range(40)]
    judge = a_judge(endpoint, limits={"attempts": 2})
    ask(fine, judge, ledger)
    replies = ask([*fine, *hopeless], judge, ledger)
    assert [reply.status for reply in replies] == ["ok"] * 10 + ["failed"] * 40
    assert accounted(endpoint, ledger)


def test_without_any_successful_call_a_probe_decides(endpoint: Running, ledger: Ledger) -> None:
    replies = ask([fault("page", ALWAYS), fault("filter", ALWAYS)], a_judge(endpoint), ledger)
    assert [reply.status for reply in replies] == ["failed", "failed"]
    probes = ledger.frame().filter(purpose="probe")
    assert set(probes["status"]) == {"ok"} and accounted(endpoint, ledger)


@pytest.mark.parametrize(
    ("kind", "remedy"),
    [
        ("400", "correct decoding"),
        ("401", "api_key_env"),
        ("403", "this model"),
        ("404", "check model and base_url"),
        ("308", "check base_url"),
        ("quota", "top up the account"),
    ],
)
@pytest.mark.parametrize("worked", [False, True])
def test_an_error_that_affects_every_call_stops_the_batch_at_once(
    endpoint: Running, ledger: Ledger, kind: str, remedy: str, worked: bool
) -> None:
    judge = a_judge(endpoint, limits={"concurrency": 2})
    prompts = [f"call {i}" for i in range(100)]
    if worked:
        ask(prompts[:10], judge, ledger)
    endpoint.control(every={"kind": kind})
    with pytest.raises(JudgeStoppedError, match=remedy):
        ask(prompts, judge, ledger)
    assert len(endpoint.lines()) < 20
    assert accounted(endpoint, ledger)
    endpoint.control(every=None)
    assert {reply.status for reply in ask(prompts, judge, ledger)} == {"ok"}


def test_an_error_that_affects_one_call_fails_only_that_call(endpoint: Running, ledger: Ledger) -> None:
    long, fine = ask([fault("context", ALWAYS), "fine"], a_judge(endpoint), ledger)
    assert (long.status, long.attempts, fine.status) == ("failed", 1, "ok")
    assert long.error is not None and "context" in long.error


def test_replies_record_the_model_that_answered(endpoint: Running, ledger: Ledger) -> None:
    prompts = ["as requested", fault("model", ALWAYS, model="judge-2-mini"), fault("no_model", ALWAYS)]
    replies = ask(prompts, a_judge(endpoint), ledger)
    assert [reply.model for reply in replies] == ["judge-1", "judge-2-mini", None]
    assert [reply.model for reply in ask(prompts, a_judge(endpoint), ledger)] == [r.model for r in replies]
    assert sorted(ledger.frame()["reply_model"].drop_nulls()) == ["judge-1", "judge-2-mini"]


def test_empty_replies_and_refusals_count_as_replies(endpoint: Running, ledger: Ledger) -> None:
    judge = a_judge(endpoint, prices=PRICES)
    kinds = ("empty", "refusal", "no_usage", "huge_usage")
    empty, refusal, uncounted, huge = ask([fault(kind) for kind in kinds], judge, ledger)
    assert huge.tokens_in is None and ledger.frame().height == 4
    assert (empty.status, empty.text, empty.refusal) == ("ok", "", None)
    assert (refusal.status, refusal.text, refusal.refusal) == ("ok", None, "I cannot judge that.")
    assert uncounted.tokens_in is None
    assert (
        uncounted.usd is not None and empty.usd is not None and uncounted.usd > empty.usd
    )  # charged at the upper bound
    assert set(endpoint.counts().values()) == {1}


def test_costs_follow_the_price_list(endpoint: Running, ledger: Ledger) -> None:
    (reply,) = ask(["x" * 400], a_judge(endpoint, prices=PRICES), ledger)
    assert (reply.tokens_in, reply.tokens_cached, reply.tokens_out) == (104, 2, 10)
    assert reply.usd == pytest.approx((102 * 10 + 2 * 1 + 10 * 20) / 1e6)


def test_an_outage_stops_the_batch_and_the_next_run_resumes_it(endpoint: Running, ledger: Ledger) -> None:
    prompts = [f"outage {i}" for i in range(300)]
    judge = a_judge(endpoint, limits={"attempts": 2})

    def cut(done: int, total: int, note: str) -> None:
        if done < 300:
            endpoint.control(every={"kind": "503"})

    with pytest.raises(JudgeStoppedError, match=r"\d+ calls in a row failed.*503.*down"):
        ask(prompts, judge, ledger, progress=cut)
    endpoint.control(every=None)
    replies = ask(prompts, judge, ledger)
    assert [reply.text for reply in replies] == [reply_to(prompt) for prompt in prompts]
    answered = [line["prompt"] for line in endpoint.lines("answered") if line["what"] == "reply"]
    assert sorted(answered) == sorted(prompts)  # each paid for once
    assert accounted(endpoint, ledger)


def test_a_short_outage_is_waited_out(endpoint: Running, ledger: Ledger) -> None:
    endpoint.control(every={"kind": "503"})
    timer = threading.Timer(0.3, lambda: endpoint.control(every=None))
    timer.start()
    policy = RetryPolicy(base_s=0.2, cap_s=0.4)
    judge = a_judge(endpoint, limits={"attempts": 20})
    replies = ask([f"short {i}" for i in range(30)], judge, ledger, policy=policy)
    timer.join()
    assert {reply.status for reply in replies} == {"ok"}
    assert accounted(endpoint, ledger)


def test_an_unreachable_endpoint_stops_the_batch(endpoint: Running, ledger: Ledger) -> None:
    judge = a_judge(endpoint, base_url="http://127.0.0.1:9/v1", limits={"attempts": 2})
    with pytest.raises(JudgeStoppedError, match=r"connection failed.*seems to be down"):
        ask(["a", "b"], judge, ledger)
    rows = ledger.frame()
    assert rows["lost_replies"].sum() == 0  # never sent, never paid for
    assert set(rows["status"]) == {"stopped"}
    assert all("connection failed" in error for error in rows["error"])


def start(endpoint: Running, store: Path, calls: int) -> subprocess.Popen[bytes]:
    """Start a process that makes judge calls; its output goes to `output_file`."""
    command = [
        sys.executable,
        "-m",
        "tests.resources.judges.batch_process",
        endpoint.url,
        str(store),
        str(calls),
    ]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    with output_file(store).open("ab") as output:
        return subprocess.Popen(
            command, cwd=PROJECT, env=environment, stdout=output, stderr=subprocess.STDOUT
        )


def output_file(store: Path) -> Path:
    return store.with_suffix(".log")


def wait_for(endpoint: Running, answered: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 30
    while len(endpoint.lines("answered")) < answered:
        assert process.poll() is None, f"it exited on its own with {process.returncode}"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_after_kill_9_only_calls_in_flight_are_paid_for_twice(endpoint: Running, tmp_path: Path) -> None:
    endpoint.control(latency=0.1)
    store, prompts = tmp_path / "killed", batch_process.prompts(200)
    for answered in (40, 100):  # killed, resumed, killed again
        with start(endpoint, store, 200) as process:
            wait_for(endpoint, answered, process)
            process.kill()
    before = endpoint.counts("answered")
    with Ledger(ArtifactStore(store)) as ledger:
        rows = ledger.frame()
        kept = rows.filter(status="ok").height
        lost = rows.filter(status="lost")
        assert sum(before.values()) - 16 <= kept <= sum(before.values())
        assert 0 < lost.height <= 16
        tally = Tally()
        judge = a_judge(endpoint)
        replies = ask(prompts, judge, ledger, tally=tally)
        assert [reply.text for reply in replies] == [reply_to(prompt) for prompt in prompts]
        assert (tally.cached, tally.received, tally.lost) == (kept, 200 - kept, lost.height)
        in_flight = {prompts[[r.call_key for r in replies].index(key)] for key in lost["call_key"]}
    counts = endpoint.counts()
    assert {prompt for prompt, count in counts.items() if count > 1} <= in_flight
    assert all(counts[prompt] >= 1 for prompt in prompts)
    # Every request has a row; a "lost" row may belong to a request that was killed before it was sent.
    assert 0 <= rows["attempts"].sum() + tally.requests - sum(counts.values()) <= lost.height


def test_an_interrupt_loses_nothing(endpoint: Running, tmp_path: Path) -> None:
    endpoint.control(latency=0.2)
    store = tmp_path / "interrupted"
    with start(endpoint, store, 100) as process:
        wait_for(endpoint, 16, process)
        process.send_signal(signal.SIGINT)
        process.wait(timeout=20)
    assert "interrupted" in output_file(store).read_text()
    with Ledger(ArtifactStore(store)) as ledger:
        statuses = ledger.frame()["status"].to_list()
    answered = len(endpoint.lines("answered"))
    assert statuses == ["ok"] * answered and 16 <= answered == len(endpoint.lines()) < 100


def test_an_interrupt_does_not_wait_forever(endpoint: Running, ledger: Ledger) -> None:
    class StopError(BaseException):
        pass

    def stop(done: int, total: int, note: str) -> None:
        if endpoint.lines():
            raise StopError

    policy = RetryPolicy(grace_s=0.1)
    with pytest.raises(StopError):
        ask([fault("timeout")], a_judge(endpoint), ledger, progress=stop, policy=policy)
    (row,) = ledger.frame().to_dicts()
    assert (row["status"], row["lost_replies"], row["error"]) == ("stopped", 1, "stopped while in flight")


def test_the_budget_stops_before_it_is_exceeded(endpoint: Running, ledger: Ledger) -> None:
    prompts = [f"prompt {i:03}" for i in range(100)]
    # A call could cost at most (26 * 10 + 10 * 20) / 1e6: the number of bytes bounds the tokens.
    cost = (6 * 10 - 2 * 9 + 10 * 20) / 1e6
    judge = a_judge(endpoint, prices=PRICES, decoding=JudgeDecoding(max_tokens=10))
    judge = judge.model_copy(update={"budget_usd": 30 * cost})
    with pytest.raises(BudgetExceededError, match=r"budget of \$0.00726.*raise budget_usd"):
        ask(prompts, judge, ledger)
    rows = ledger.frame()
    assert set(rows["status"]) == {"ok"} and rows["usd"].sum() <= 30 * cost
    assert 27 <= rows.height == len(endpoint.lines()) <= 30
    with pytest.raises(BudgetExceededError):  # what the batch has spent counts
        ask(prompts, judge, ledger)
    assert len(endpoint.lines()) == rows.height
    richer = judge.model_copy(update={"budget_usd": 200 * cost})
    assert {reply.status for reply in ask(prompts, richer, ledger)} == {"ok"}
    assert set(endpoint.counts().values()) == {1}


def test_lost_replies_count_against_the_budget(endpoint: Running, ledger: Ledger) -> None:
    judge = a_judge(endpoint, prices=PRICES, decoding=JudgeDecoding(max_tokens=10), budget_usd=0.002)
    with pytest.raises(BudgetExceededError, match=r"\$0.0000 is spent and up to \$0.00\d* for lost replies"):
        ask([fault("truncated", 10**6)], judge, ledger)
    requests = len(endpoint.lines())
    with pytest.raises(BudgetExceededError):  # what an earlier run lost counts
        ask([fault("truncated", 10**6)], judge, ledger)
    assert len(endpoint.lines()) == requests


def test_a_full_disk_stops_the_spending(
    endpoint: Running, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, room = os.write, 50

    def write(handle: int, data: bytes) -> int:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(handle, data)

    with monkeypatch.context() as patched:
        patched.setattr(resources.judges.ledger_writer.os, "write", write)
        with pytest.raises(ArtifactError, match="no space left"):
            ask([f"full {i}" for i in range(500)], a_judge(endpoint), ledger)
        assert len(endpoint.lines()) <= 50
    with pytest.raises(ArtifactError):
        ledger.close()
    replies = ask([f"full {i}" for i in range(50)], a_judge(endpoint), ledger)
    assert {reply.status for reply in replies} == {"ok"}


def test_the_api_key_does_not_leak(endpoint: Running, tmp_path: Path, ledger: Ledger) -> None:
    store = tmp_path / "canary"
    with start(endpoint, store, 20) as process:
        process.wait(timeout=30)
    output = output_file(store).read_text()
    assert "finished" in output and "DEBUG" in output
    endpoint.control(every={"kind": "echo_key"})
    with pytest.raises(JudgeStoppedError) as stopped:
        ask(["echoed"], a_judge(endpoint), ledger)
    assert "[key]" in str(stopped.value)
    endpoint.control(every=None)
    (reply,) = ask([fault("echo_key_500", ALWAYS)], a_judge(endpoint), ledger)
    assert reply.error is not None and "[key]" in reply.error
    ledger.flush()
    texts = [output, str(stopped.value), repr(stopped.value), repr(reply), repr(a_judge(endpoint))]
    assert not [text for text in texts if KEY in text]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 3 and not [path for path in files if KEY.encode() in path.read_bytes()]


def test_a_missing_key_stops_before_any_request(
    endpoint: Running, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CANARY_KEY")
    with pytest.raises(JudgeStoppedError, match="environment variable CANARY_KEY"):
        ask(["a"], a_judge(endpoint), ledger)
    monkeypatch.setenv("CANARY_KEY", "not a key\n at all")
    with pytest.raises(JudgeStoppedError, match="is not a valid key") as stopped:
        ask(["a"], a_judge(endpoint), ledger)
    assert "at all" not in str(stopped.value)
    assert not endpoint.lines()


def test_a_placeholder_key_does_not_alter_replies(
    tmp_path: Path, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CANARY_KEY", "e")
    with running(tmp_path / "open.jsonl") as endpoint:
        assert ask(["a"], a_judge(endpoint), ledger)[0].text == reply_to("a")


def test_without_an_api_key_none_is_sent(tmp_path: Path, ledger: Ledger) -> None:
    with running(tmp_path / "open.jsonl") as endpoint:
        ask(["a"], a_judge(endpoint, api_key_env=None), ledger)
        assert [line["authorized"] for line in endpoint.lines()] == [False]


def test_response_formats(endpoint: Running, ledger: Ledger) -> None:
    calls = calls_for([f"schema {i}" for i in range(12)], response_format=SCHEMA)
    forced = a_judge(endpoint, structured="json_schema")
    judge_calls(calls[:2], forced, ledger)
    assert all(line["schema"] for line in endpoint.lines())
    endpoint.control(no_schema=True)
    with pytest.raises(JudgeStoppedError, match="structured"):
        judge_calls(calls, forced, ledger)
    auto = a_judge(endpoint)
    replies = judge_calls(calls, auto, ledger)
    assert {reply.status for reply in replies} == {"ok"}
    assert sum(reply.from_ledger for reply in replies) == 2
    assert set(ledger.outcomes([reply.call_key for reply in replies])) == {
        reply.call_key for reply in replies
    }
    before = len(endpoint.lines())
    assert all(reply.from_ledger for reply in judge_calls(calls, auto, ledger))
    off = judge_calls(calls, a_judge(endpoint, structured="off"), ledger)
    assert sum(reply.from_ledger for reply in off) == 10
    assert len(endpoint.lines()) == before + 2
    assert accounted(endpoint, ledger)


def test_forecast(endpoint: Running, ledger: Ledger) -> None:
    prompts = [f"{i:04}" * 100 for i in range(60)]
    limits = {"requests_per_minute": 600, "tokens_per_minute": 10**6}
    judge = a_judge(endpoint, prices=PRICES, decoding=JudgeDecoding(max_tokens=50), limits=limits)
    rough = forecast(calls_for(prompts), judge, ledger)
    assert (rough.calls, rough.cached, rough.calibrated_on) == (60, 0, 0)
    assert (rough.tokens_in, rough.tokens_out_max, rough.usd_expected) == (6000, 3000, None)
    assert rough.seconds == pytest.approx(6)
    ask(prompts[:30], judge, ledger)
    better = forecast(calls_for(prompts), judge, ledger)
    assert (better.calls, better.cached, better.calibrated_on) == (30, 30, 30)
    assert better.tokens_in == 30 * 104 and better.tokens_out_expected == 300
    replies = ask(prompts[30:], judge, ledger)
    usd = sum(reply.usd or 0 for reply in replies)
    assert better.usd_expected == pytest.approx(usd, rel=0.01)
    assert better.usd_max is not None and rough.usd_max is not None and usd < better.usd_max < rough.usd_max
    assert forecast(calls_for(prompts), judge, ledger).calls == 0


def test_judge_calls_work_inside_event_loops_and_threads(endpoint: Running, ledger: Ledger) -> None:
    judge = a_judge(endpoint)

    async def inside() -> list[Reply]:
        return ask(["in a loop"], judge, ledger)

    assert asyncio.run(inside())[0].status == "ok"
    with ThreadPoolExecutor(4) as pool:
        batches = list(
            pool.map(lambda i: ask([f"thread {i} {j}" for j in range(10)], judge, ledger), range(4))
        )
    assert all(reply.status == "ok" for batch in batches for reply in batch)
    assert set(endpoint.counts().values()) == {1}


def test_ledgers_in_object_stores(endpoint: Running, tmp_path: Path) -> None:
    pytest.importorskip("obstore", reason="object stores need the extra s3")
    store = ArtifactStore("memory://judging", cache=tmp_path / "cache")
    prompts = [f"remote {i}" for i in range(40)]
    with Ledger(store) as ledger:
        ask(prompts[:30], a_judge(endpoint), ledger)
    with Ledger(store) as ledger:
        assert ledger.compact().rows == 30
        replies = ask(prompts, a_judge(endpoint), ledger)
        assert [reply.text for reply in replies] == [reply_to(prompt) for prompt in prompts]
        assert ledger.frame().height == 40
    assert set(endpoint.counts().values()) == {1}
