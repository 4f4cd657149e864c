"""A fake judge over HTTP: replies follow a rule on the texts it is shown, and it can be down for some of them."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FENCED = re.compile(
    r"<<<(?P<name>[A-Z0-9_ ]+) (?P<code>[0-9a-f]+)\n(?P<text>.*?)\n(?P=name) (?P=code)>>>", re.S
)

Rule = Callable[[dict[str, str], int], Any]
"""(name → text as shown, how often this question was answered before) → the reply, as JSON or raw text."""


def texts(question: str) -> dict[str, str]:
    """The texts of a question by fence name, e.g. ``RESPONSE A``."""
    return {match["name"]: match["text"] for match in FENCED.finditer(question)}


class RuleEndpoint(ThreadingHTTPServer):
    """``down`` selects questions (texts by name) that get HTTP 500; ``asked`` counts those that were answered."""

    def __init__(self, rule: Rule) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.rule = rule
        self.down: Callable[[dict[str, str]], bool] = lambda shown: False
        self.asked: Counter[str] = Counter()
        self.questions: list[list[dict[str, str]]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def shown(self) -> list[dict[str, str]]:
        """The texts of every answered question."""
        return [texts(question) for question in self.asked.elements()]


class Handler(BaseHTTPRequestHandler):
    server: RuleEndpoint

    def do_POST(self) -> None:
        messages = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"]
        question = messages[-1]["content"]
        shown = texts(question)
        down = self.server.down(shown)
        with self.server.lock:
            before = self.server.asked[question]
            if not down:
                self.server.asked[question] += 1
                self.server.questions.append(messages)
        answer = self.server.rule(shown, before)
        content = answer if isinstance(answer, str) else json.dumps(answer)
        message = {"role": "assistant", "content": content}
        reply = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": "toy",
            "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
            "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
        }
        payload = json.dumps({"error": {"message": "down"}} if down else reply).encode()
        self.send_response(500 if down else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        """Suppress the request log."""


@contextmanager
def judged_by(rule: Rule) -> Iterator[RuleEndpoint]:
    """Run an endpoint that answers by this rule."""
    server = RuleEndpoint(rule)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
