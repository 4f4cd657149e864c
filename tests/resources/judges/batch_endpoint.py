"""A fake Batch API over HTTP: files, batches, their states. Batches end when the test says so.

Replies follow a rule; tests read its state (files, batches, how often each request was submitted).
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-canary-77d1"


class BatchEndpoint(ThreadingHTTPServer):
    """``reply`` maps a question to the text of its reply; with ``ends``, batches complete when first polled."""

    def __init__(self, reply: Callable[[str], str], *, ends: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply = reply
        self.ends = ends  # whether batches complete when first polled
        self.fails: set[str] = set()  # questions that get an error instead of a reply
        self.forgets: set[str] = set()  # questions that get no output line at all
        self.lost_answers = 0  # how many of the next batches are created, but answered with an error
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.taken: Counter[str] = Counter()  # custom_id → how often it was submitted
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def start(self) -> BatchEndpoint:
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def end(self, status: str = "completed") -> None:
        """Ends all open batches."""
        for batch in self.batches.values():
            if batch["status"] == "in_progress":
                self._end(batch, status)

    def _end(self, batch: dict[str, Any], status: str) -> None:
        good, bad = [], []
        for text in self.files[batch["input_file_id"]].splitlines():
            request = json.loads(text)
            question = request["body"]["messages"][-1]["content"]
            if question in self.forgets or status == "expired":
                continue
            if question in self.fails:
                body = {"error": {"message": f"bad request with {KEY}"}}
                response = {"status_code": 400, "request_id": "r", "body": body}
                bad.append({"custom_id": request["custom_id"], "response": response, "error": None})
                continue
            message = {"role": "assistant", "content": self.reply(question)}
            choice = {"index": 0, "finish_reason": "stop", "message": message}
            usage = {"prompt_tokens": 1000, "completion_tokens": 100, "total_tokens": 1100}
            body = {"id": "x", "object": "chat.completion", "choices": [choice], "usage": usage}
            response = {"status_code": 200, "request_id": "r", "body": body}
            good.append({"custom_id": request["custom_id"], "response": response, "error": None})
        for field, lines in (("output_file_id", good[::-1]), ("error_file_id", bad)):  # in any order
            if lines:
                name = f"file-{len(self.files)}"
                self.files[name] = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
                batch[field] = name
        batch["status"] = status


class Handler(BaseHTTPRequestHandler):
    server: BatchEndpoint

    def do_POST(self) -> None:
        assert self.headers["Authorization"] == f"Bearer {KEY}"
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.server.lock:
            if self.path == "/v1/files":
                boundary = self.headers["Content-Type"].split("boundary=")[1].encode()
                (content,) = [
                    part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n")
                    for part in body.split(b"--" + boundary)
                    if b'name="file"' in part
                ]
                name = f"file-{len(self.server.files)}"
                self.server.files[name] = content
                self._send({"id": name, "object": "file", "bytes": len(content), "created_at": 0,
                            "filename": "f", "purpose": "batch", "status": "processed"})  # fmt: skip
                return
            assert self.path == "/v1/batches"
            request = json.loads(body)
            batch = {
                "id": f"batch_{len(self.server.batches)}",
                "object": "batch",
                "created_at": int(time.time()),
                "status": "in_progress",
                **request,
            }
            self.server.batches[batch["id"]] = batch
            for text in self.server.files[request["input_file_id"]].splitlines():
                self.server.taken[json.loads(text)["custom_id"]] += 1
            if self.server.lost_answers:
                self.server.lost_answers -= 1
                self._send({"error": {"message": "gateway"}}, 403)  # the client does not retry this
                return
            self._send(batch)

    def do_GET(self) -> None:
        with self.server.lock:
            if re.fullmatch(r"/v1/batches(\?.*)?", self.path):
                listed = list(self.server.batches.values())[::-1]
                self._send({"object": "list", "data": listed, "has_more": False})
            elif match := re.fullmatch(r"/v1/batches/(\w+)", self.path):
                batch = self.server.batches.get(match[1])
                if batch is None:
                    self._send({"error": {"message": f"No batch found with id {match[1]}"}}, 404)
                    return
                if self.server.ends and batch["status"] == "in_progress":
                    self.server._end(batch, "completed")
                self._send(batch)
            elif match := re.fullmatch(r"/v1/files/([\w-]+)/content", self.path):
                content = self.server.files.get(match[1])
                if content is None:
                    self._send({"error": {"message": "No such File object"}}, 404)
                else:
                    self._raw(content, 200)
            else:
                self._send({"error": {"message": self.path}}, 404)

    def _send(self, content: dict[str, Any], status: int = 200) -> None:
        self._raw(json.dumps(content).encode(), status)

    def _raw(self, payload: bytes, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        self.end_headers()
        self.wfile.write(payload)

    def log_message(self, *_: Any) -> None:
        """Suppress the request log."""
