"""A rule-based, OpenAI-compatible endpoint that answers any question a template can ask.

The answer depends only on the question and conforms to the JSON schema in the request.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@contextlib.contextmanager
def rule_judge() -> Iterator[str]:
    """Runs the endpoint and yields its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answer(schema: dict[str, Any], question: str) -> Any:
    """A value that conforms to the schema."""
    number = int.from_bytes(hashlib.sha256(question.encode()).digest()[:4], "big")
    if "enum" in schema:
        return schema["enum"][number % len(schema["enum"])]
    if schema["type"] == "object":
        return {name: answer(inner, f"{name} {question}") for name, inner in schema["properties"].items()}
    if schema["type"] == "string":
        return f"It has {number % 4} flaws."
    low, high = int(schema["minimum"]), int(schema["maximum"])
    return low + number % (high - low + 1)


class _Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        schema = request["response_format"]["json_schema"]["schema"]
        text = json.dumps(answer(schema, request["messages"][-1]["content"]))
        reply = {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            ],
            "usage": {"prompt_tokens": 100, "completion_tokens": 20, "total_tokens": 120},
        }
        payload = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        """Quiet."""
