"""Judge calls per second, compared with a loop that makes one call at a time, in one run.

    python -m benchmarks.judging
    python -m benchmarks.judging --latency 0.5 --slots 128

A local endpoint answers every call after ``--latency`` seconds. Ideal is ``slots / latency``. The loop
is as published: the library's synchronous client, one call per sample, up to five attempts, the
replies kept in memory; ``judge_calls`` also writes and syncs its ledger.
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import tempfile
import time
from pathlib import Path

import openai

from resources.judges.client import Call, judge_calls
from resources.judges.ledger import Ledger
from resources.store import ArtifactStore
from tests.resources.judges.fake_endpoint import running
from textalign_dagster.settings.judge import Judge, JudgeLimits

RUBRIC = "You are an expert rater of summaries. " + "Judge coherence, accuracy and coverage. " * 30
SCORE = re.compile(r"Score: ([0-9.]+)")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.judging",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--latency", type=float, default=0.2, help="seconds per call")
    parser.add_argument("--slots", type=int, default=64, help="calls in flight")
    parser.add_argument("--seconds", type=float, default=8.0, help="ideal duration of each of the two")
    options = parser.parse_args()
    few = round(options.seconds / options.latency)
    many = few * options.slots
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory() as folder:
        with running(Path(folder, "requests.jsonl"), options.latency) as endpoint:
            seconds = one_at_a_time(endpoint.url, few)
            loop = few / seconds
            print(f"one at a time: {few:5,} calls in {seconds:5.2f} s: {loop:6.1f} calls/s")
            cpu = cpu_seconds()
            seconds, again = windowed(endpoint.url, many, options.slots, Path(folder, "store"))
            cpu = cpu_seconds() - cpu
            window, ideal = many / seconds, options.slots / options.latency
            assert sum(endpoint.counts().values()) == few + many
        print(f"judge_calls:   {many:5,} calls in {seconds:5.2f} s: {window:6.1f} calls/s")
        print(f"{window / ideal:.1%} of the ideal {ideal:.0f} calls/s, {window / loop:.1f} times the loop")
        print(f"{cpu / many * 1000:.2f} ms of CPU per call; all of them again from the ledger: {again:.2f} s")


def messages(n: int) -> list[dict[str, str]]:
    return [{"role": "system", "content": RUBRIC}, {"role": "user", "content": f"POST: {n} SUMMARY: {n}"}]


def windowed(url: str, count: int, slots: int, store: Path) -> tuple[float, float]:
    """Seconds for the batch, and for the same batch again, from the ledger."""
    judge = Judge(
        model="judge-1",
        template="any",
        base_url=url,
        api_key_env=None,
        limits=JudgeLimits(concurrency=slots),
    )
    calls = [Call(messages(n)) for n in range(count)]
    times = []
    with Ledger(ArtifactStore(store)) as ledger:
        for _ in range(2):
            started = time.perf_counter()
            replies = judge_calls(calls, judge, ledger)
            times.append(time.perf_counter() - started)
            assert all(reply.status == "ok" for reply in replies)
    return times[0], times[1]


def one_at_a_time(url: str, count: int) -> float:
    """Seconds for ``count`` calls made one at a time, as published."""
    client = openai.OpenAI(api_key="none", base_url=url)
    scores: list[float | None] = []
    started = time.perf_counter()
    for n in range(count):
        score = None
        for _ in range(5):
            try:
                completion = client.chat.completions.create(
                    model="judge-1",
                    messages=messages(-1 - n),  # type: ignore[arg-type]
                    temperature=0,
                )
                match = SCORE.search(completion.choices[0].message.content or "")
            except openai.OpenAIError:
                continue
            if match is not None:
                score = float(match[1])
                break
        scores.append(score)
    return time.perf_counter() - started


def cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
