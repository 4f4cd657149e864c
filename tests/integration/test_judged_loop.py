"""The loop with an LLM judge over HTTP: a stage that fails midway resumes, and pays for nothing twice.

The endpoint here is rule-based; the parser's tests cover replies of real models.
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
    """An endpoint that returns a feedback sentence and a score.

    ``broken``: it fails for half of the questions, every time. ``down``: it fails for all of them.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.broken = self.down = False
        self.requests = 0
        self.model = "toy-judge"
        self.answered: Counter[str] = Counter()
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
            self.server.requests += 1
            down = self.server.down or (self.server.broken and len(question) % 2 == 0)
            if not down:
                self.server.answered[question] += 1
        score = len(question) % 4
        answer = {"analysis": "Looked at.", "feedback": f"has {3 - score} flaws", "score": score}
        reply: dict[str, Any] = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": self.server.model,
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


def test_failed_calls_do_not_block_others_and_are_retried_on_request(tmp_path: Path, judge: Judge) -> None:
    home = tmp_path / "home"
    env = environment(home, judged_toy(tmp_path / "experiments", judge)) | {"TOY_KEY": KEY}
    before = json.loads(textalign("forecast", "judged", "--json", env=env).stdout)
    assert before["calls"] == 12 and before["cached"] == 0 and not before["samples_exist"]

    judge.down = True
    stopped = textalign("run", "judged", env=env, ok=False)
    assert "seems to be down" in stopped.stderr
    judge.down, judge.broken, judge.requests = False, True, 0

    failed = textalign("run", "judged", env=env, ok=False)
    assert "usable" in failed.stderr and "--retry-failed" in failed.stderr
    answered = len(judge.answered)
    assert 0 < answered < 12
    between = json.loads(textalign("forecast", "judged", "--json", env=env).stdout)
    assert between["samples_exist"]
    assert (between["cached"], between["failed"], between["calls"]) == (answered, 12 - answered, 0)

    requests = judge.requests
    again = textalign("run", "judged", env=env, ok=False)
    assert "usable" in again.stderr and judge.requests == requests, "a plain run sent a failed call again"

    judge.broken = False
    textalign("run", "judged", "--retry-failed", env=env)
    up_to_date = textalign("run", "judged", "--retry-failed", env=env)
    assert "up to date" in up_to_date.stdout

    store = ArtifactStore(str(home / "store"))
    with connect(store) as database:
        rows = database.execute(
            "select status, kind, text, value, scorer, len(call_keys) from feedback"
        ).fetchall()
        paid = database.execute(
            "select count(*), sum(usd) from feedback_calls where status = 'ok' and purpose <> 'probe'"
        ).fetchall()
        probes = database.execute("select count(*) from feedback_calls where purpose = 'probe'").fetchall()
        sent = database.execute("select sum(attempts) from feedback_calls").fetchall()
    assert sum(judge.answered.values()) <= 12 + probes[0][0], "something was paid for twice"
    assert sent[0][0] >= judge.requests
    assert len(rows) == 12
    assert {row[0] for row in rows} == {"ok"}
    assert all(text == f"has {3 - int(value)} flaws" and keys == 1 for _, _, text, value, _, keys in rows)
    count, usd = paid[0]
    assert count == 12 and usd == pytest.approx(count * (100 * 1.0 + 20 * 2.0) / 1e6)


def test_another_model_in_the_replies_does_not_fail_the_run(tmp_path: Path, judge: Judge) -> None:
    judge.model = "toy-judge-mini"
    home = tmp_path / "home"
    env = environment(home, judged_toy(tmp_path / "experiments", judge)) | {"TOY_KEY": KEY}
    textalign("run", "judged", env=env)
    pointer = ArtifactStore(str(home / "store")).pointer("judged", 1, "feedback")
    assert pointer is not None and pointer.artifact.manifest["facts"]["reply_models"] == {
        "toy-judge-mini": 12
    }


def test_api_key_is_not_written_anywhere(tmp_path: Path, judge: Judge) -> None:
    home = tmp_path / "home"
    env = environment(home, judged_toy(tmp_path / "experiments", judge)) | {"TOY_KEY": KEY}
    done = textalign("run", "judged", env=env)
    assert KEY not in done.stdout + done.stderr
    leaks = [p for p in home.rglob("*") if p.is_file() and KEY.encode() in p.read_bytes()]
    assert leaks == []


def test_nothing_starts_without_the_api_key(tmp_path: Path, judge: Judge) -> None:
    env = environment(tmp_path / "home", judged_toy(tmp_path / "experiments", judge))
    refused = textalign("run", "judged", env=env, ok=False)
    assert "TOY_KEY" in refused.stderr and "judged.yaml" in refused.stderr
    assert not (tmp_path / "home" / "store" / "artifacts").exists()
