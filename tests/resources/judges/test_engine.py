"""The engine terminates, whatever the endpoint does: random mixes of calls over real HTTP, with outages."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("openai", reason="judges need the extra judges")

from resources.judges.client import Call, Reply, RetryPolicy, judge_calls
from resources.judges.errors import JudgeStoppedError
from resources.judges.ledger import Ledger
from resources.store import ArtifactStore
from tests.resources.judges.fake_endpoint import Running, reply_to, running
from textalign_dagster.settings.judge import Judge, JudgeLimits

ATTEMPTS = 4
QUICK = RetryPolicy(base_s=0.005, cap_s=0.02, patience_s=0.5, outage_calls=4, grace_s=5)
ALWAYS = 10**6
GOOD = st.just("")
SLOW = st.sampled_from([0.02, 0.1]).map(lambda s: f'FAULT{{"kind": "reply", "times": 1, "latency": {s}}}')
FLAKY = st.tuples(st.sampled_from(["500", "truncated", "reset", "gzip"]), st.integers(1, ATTEMPTS - 2)).map(
    lambda drawn: f'FAULT{{"kind": "{drawn[0]}", "times": {drawn[1]}}}'
)
HOPELESS = st.sampled_from(
    ["500", "page", "no_choices", "truncated", "gzip", "filter", "wall", "context"]
).map(lambda kind: f'FAULT{{"kind": "{kind}", "times": {ALWAYS}}}')
OUTAGES = st.none() | st.tuples(st.integers(0, 150), st.sampled_from([0.05, 0.3, 60.0]))
numbers = itertools.count()


@pytest.fixture(scope="module")
def endpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("engine") / "requests.jsonl", latency=0.003) as endpoint:
        yield endpoint


@pytest.mark.parametrize("slots", [1, 64])
@settings(max_examples=20, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    orders=st.lists(GOOD | GOOD | SLOW | FLAKY | HOPELESS, min_size=1, max_size=120),
    hopeless_last=st.booleans(),
    outage=OUTAGES,
)
def test_every_batch_ends_with_the_right_outcomes(
    endpoint: Running,
    tmp_path_factory: pytest.TempPathFactory,
    slots: int,
    orders: list[str],
    hopeless_last: bool,
    outage: tuple[int, float] | None,
) -> None:
    if hopeless_last:
        orders = sorted(orders, key=lambda order: str(ALWAYS) in order)
    example = next(numbers)
    prompts = [f"{example}.{n} {order}" for n, order in enumerate(orders)]
    seen = len(endpoint.lines())
    endpoint.control(outage_after=outage and [seen + outage[0], outage[1]], outage_until=None)
    with Ledger(ArtifactStore(tmp_path_factory.mktemp("store"))) as ledger:
        try:
            replies = ask(prompts, endpoint, ledger, slots)
        except JudgeStoppedError as stopped:
            assert outage is not None and "HTTP 503" in str(stopped) and "down" in str(stopped)
            endpoint.control(outage_after=None)
            replies = ask(prompts, endpoint, ledger, slots)
        for prompt, reply in zip(prompts, replies, strict=True):
            expected = ("failed", None) if str(ALWAYS) in prompt else ("ok", reply_to(prompt))
            assert (reply.status, reply.text) == expected, prompt
        rows = ledger.frame()
        requests = endpoint.lines()[seen:]
        assert len(requests) == rows["attempts"].sum(), "a request without a row"
        paid = Counter(line["prompt"] for line in endpoint.lines("answered") if line["what"] == "reply")
        probes = rows.filter(purpose="probe", status="ok").height
        duplicates = sum(paid[prompt] - 1 for prompt in prompts if paid[prompt])
        assert duplicates <= probes, "a call was paid for twice"

        again = ask(prompts, endpoint, ledger, slots)
        assert len(endpoint.lines()) == seen + len(requests), "a call that has an outcome was sent again"
        assert [(r.status, r.text, r.error) for r in again] == [(r.status, r.text, r.error) for r in replies]


def ask(prompts: list[str], endpoint: Running, ledger: Ledger, slots: int) -> list[Reply]:
    limits: dict[str, Any] = {"concurrency": slots, "timeout_s": 20.0, "attempts": ATTEMPTS}
    judge = Judge(
        model="judge-1",
        template="any",
        base_url=endpoint.url,
        api_key_env=None,
        limits=JudgeLimits(**limits),
    )
    calls = [Call([{"role": "user", "content": prompt}]) for prompt in prompts]
    return judge_calls(calls, judge, ledger, policy=QUICK)
