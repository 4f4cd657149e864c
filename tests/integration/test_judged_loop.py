"""The loop with an LLM judge behind HTTP: a stage that fails half-way goes on, and pays for nothing twice.

The endpoint here answers by rule; what a real model answers is for the tests of the parser.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from resources.store import ArtifactStore
from resources.views import connect
from tests.toy import environment, textalign, toys
from textalign_dagster.settings import merge, write_yaml

pytest.importorskip("openai", reason="needs the extra `judges`")
KEY = "sk-canary-3f2a9c"


class Judge(ThreadingHTTPServer):
    """An endpoint that gives a feedback sentence and a score; ``broken``: it is down for now."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.broken = False
        self.asked: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Judge

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Authorization"] == f"Bearer {KEY}"
        question = json.loads(body)["messages"][-1]["content"]
        with self.server.lock:
            # Half of the questions are answered before the endpoint goes down.
            down = self.server.broken and len(question) % 2 == 0
            if not down:
                self.server.asked[question] += 1
        score = len(question) % 4
        answer = {"analysis": "Looked at.", "feedback": f"has {3 - score} flaws", "score": score}
        reply: dict[str, Any] = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "toy-judge",
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": json.dumps(answer)},
                }
            ],
            "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
        }
        payload = json.dumps({"error": {"message": "down"}} if down else reply).encode()
        self.send_response(500 if down else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        """Quiet."""


@pytest.fixture
def judge() -> Iterator[Judge]:
    server = Judge()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def judged_toy(folder: Path, judge: Judge) -> Path:
    """A toy experiment whose samples an LLM judges."""
    folder.mkdir()
    toy = merge(
        toys()["toy"],
        {
            "control": None,
            "iterations": 1,
            "method": {"ask_for": "has 0 flaws", "probe": []},
            "judge": {
                "model": "toy-judge",
                "base_url": judge.url,
                "api_key_env": "TOY_KEY",
                "template": "text_feedback",
                "limits": {"attempts": 1},
                "prices": {"input": 1.0, "output": 2.0, "as_of": "2026-01-01"},
            },
        },
    )
    (folder / "judged.yaml").write_text(write_yaml(toy), encoding="utf-8")
    return folder


def test_an_outage_stops_the_iteration_and_the_rest_is_asked_later(tmp_path: Path, judge: Judge) -> None:
    home = tmp_path / "home"
    env = environment(home, judged_toy(tmp_path / "experiments", judge)) | {"TOY_KEY": KEY}
    before = json.loads(textalign("forecast", "judged", "--json", env=env).stdout)
    assert before["calls"] == 12 and before["cached"] == 0 and not before["samples_exist"]

    judge.broken = True
    failed = textalign("run", "judged", env=env, ok=False)
    assert "usable" in failed.stderr
    answered = dict(judge.asked)
    assert 0 < len(answered) < 12 and set(answered.values()) == {1}

    between = json.loads(textalign("forecast", "judged", "--json", env=env).stdout)
    assert between["samples_exist"] and between["cached"] == len(answered)

    judge.broken = False
    textalign("run", "judged", env=env)
    assert set(judge.asked.values()) == {1}, "something was paid for twice"

    store = ArtifactStore(str(home / "store"))
    with connect(store) as database:
        rows = database.execute(
            "select status, kind, text, value, scorer, len(call_keys) from feedback"
        ).fetchall()
        paid = database.execute(
            "select count(*), sum(usd) from feedback_calls where status = 'ok'"
        ).fetchall()
    assert len(rows) == 12
    assert {row[0] for row in rows} == {"ok"}
    assert all(text == f"has {3 - int(value)} flaws" and keys == 1 for _, _, text, value, _, keys in rows)
    count, usd = paid[0]
    assert count == len(judge.asked) and usd == pytest.approx(count * (100 * 1.0 + 20 * 2.0) / 1e6)


def test_the_key_is_written_nowhere(tmp_path: Path, judge: Judge) -> None:
    home = tmp_path / "home"
    env = environment(home, judged_toy(tmp_path / "experiments", judge)) | {"TOY_KEY": KEY}
    done = textalign("run", "judged", env=env)
    assert KEY not in done.stdout + done.stderr
    leaks = [p for p in home.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
    assert leaks == []


def test_without_the_key_nothing_starts(tmp_path: Path, judge: Judge) -> None:
    env = environment(tmp_path / "home", judged_toy(tmp_path / "experiments", judge))
    refused = textalign("run", "judged", env=env, ok=False)
    assert "TOY_KEY" in refused.stderr and "judged.yaml" in refused.stderr
    assert not (tmp_path / "home" / "store" / "artifacts").exists()
