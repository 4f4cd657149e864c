"""An OpenAI-compatible endpoint with faults on request, in a separate process.

    python tests/resources/judges/fake_endpoint.py --log requests.jsonl [--latency 0.2] [--key-sha256 HEX]

prints its URL and answers ``POST /v1/chat/completions``. The last message may request a fault, as
``FAULT{"kind": "429", "times": 2, "retry_after": 0.1}``: the first ``times`` requests with that message get
the fault, later ones the reply (`reply_to`). ``POST /control`` with ``{"every": {"kind": "503"}}`` gives every
request that fault until ``{"every": null}``, and ``{"outage_after": [20, 0.5]}`` starts an outage (503) of 0.5
seconds with the 20th request. The log has a line for every request when it arrives and one when it
is answered, written before the answer is sent.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import re
import socket
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

FAULT = re.compile(r"FAULT(\{.*?\})", re.DOTALL)
STATUSES = {
    "400": (400, "'temperature' is not a valid field"),
    "401": (401, "Incorrect API key provided"),
    "403": (403, "You may not use this model"),
    "404": (404, "The model `nobody` does not exist"),
    "408": (408, "Request timeout"),
    "409": (409, "Conflict"),
    "429": (429, "Rate limit reached"),
    "500": (500, "The server had an error"),
    "503": (503, "Overloaded"),
    "308": (308, "Moved"),
}


def reply_to(prompt: str) -> str:
    """The reply to a prompt, different for every prompt, so that mix-ups are noticed."""
    return f"Score: {len(prompt) % 4} ({hashlib.sha256(prompt.encode()).hexdigest()[:12]})"


class Endpoint:
    """State shared by all connections: the log, the counts, and whether there is an outage."""

    def __init__(self, log: Path, latency: float, key_sha256: str | None) -> None:
        self.handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.latency = latency
        self.key_sha256 = key_sha256
        self.seen: Counter[str] = Counter()
        self.every: dict[str, Any] | None = None
        self.outage_after: tuple[int, float] | None = None
        self.outage_until: float | None = None
        self.no_schema = False
        self.headers: dict[str, str] = {}

    def is_down(self) -> bool:
        """Whether the outage has begun and not ended yet."""
        if self.outage_after is None or self.seen.total() < self.outage_after[0]:
            return False
        self.outage_until = self.outage_until or time.monotonic() + self.outage_after[1]
        return time.monotonic() < self.outage_until

    def log(self, event: str, prompt: str, what: str, **more: Any) -> None:
        line = {"event": event, "prompt": prompt, "what": what, "at": time.time(), **more}
        os.write(self.handle, (json.dumps(line) + "\n").encode())


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection with keep-alive."""

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.buffer = b""
        self.transport: Any = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            first, *lines = self.buffer[:end].decode("latin-1").split("\r\n")
            headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
            size = int(headers.get("content-length", 0))
            if len(self.buffer) < end + 4 + size:
                return
            body = self.buffer[end + 4 : end + 4 + size]
            self.buffer = self.buffer[end + 4 + size :]
            self.handle(first.split()[1], headers, body)

    def handle(self, path: str, headers: dict[str, str], body: bytes) -> None:
        content = json.loads(body or b"{}")
        if path == "/control":
            for name, value in content.items():
                setattr(self.endpoint, name, value)
            self.answer(200, {})
            return
        prompt = content["messages"][-1]["content"]
        self.endpoint.seen[prompt] += 1
        match = FAULT.search(prompt)
        order = json.loads(match[1]) if match else {}
        kind = order.get("kind") if self.endpoint.seen[prompt] <= order.get("times", 1) else None
        if self.endpoint.every is not None:
            order = self.endpoint.every
            kind = order["kind"]
        elif self.endpoint.is_down():
            order, kind = {}, "503"
        if self.endpoint.no_schema and "response_format" in content:
            kind = "no_schema"
        key = headers.get("authorization", "").removeprefix("Bearer ")
        if self.endpoint.key_sha256 and hashlib.sha256(key.encode()).hexdigest() != self.endpoint.key_sha256:
            kind = "401"
        schema = "response_format" in content
        self.endpoint.log("received", prompt, kind or "reply", authorized=bool(key), schema=schema)
        if kind == "timeout":
            return
        delay = order.get("latency", self.endpoint.latency)
        loop = asyncio.get_running_loop()
        loop.call_later(delay, self.finish, kind, order, content, prompt, key)

    def finish(self, kind: str | None, order: Any, content: Any, prompt: str, key: str) -> None:
        if self.transport.is_closing():
            return
        self.endpoint.log("answered", prompt, kind or "reply")
        reply = self.completion(content, prompt, reply_to(prompt))
        message = reply["choices"][0]["message"]
        if kind in STATUSES:
            status, text = STATUSES[kind]
            extra = {"retry-after": str(order["retry_after"])} if "retry_after" in order else {}
            self.answer(status, {"error": {"message": text, "type": "error", "code": None}}, extra)
        elif kind == "echo_key":
            self.answer(401, {"error": {"message": f"Incorrect API key provided: {key}"}})
        elif kind == "echo_key_500":
            self.answer(500, {"error": {"message": f"crashed while serving Bearer {key}"}})
        elif kind == "quota":
            error = {"message": "You exceeded your current quota", "code": "insufficient_quota"}
            self.answer(429, {"error": error})
        elif kind == "context":
            error = {"message": "maximum context length is 9 tokens", "code": "context_length_exceeded"}
            self.answer(400, {"error": error})
        elif kind == "no_schema":
            self.answer(
                400, {"error": {"message": "response_format is not supported", "param": "response_format"}}
            )
        elif kind == "reset":
            linger = struct.pack("ii", 1, 0)  # makes closing send RST
            self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.transport.abort()
        elif kind == "truncated":
            self.answer(200, reply, cut=order.get("cut", "body"))
        elif kind == "schema":
            self.answer(200, {"error": {"message": "provider failed"}})
        elif kind == "no_choices":
            self.answer(200, {**reply, "choices": []})
        elif kind == "page":
            self.answer(200, b"<html><body>Gateway. Your score: 3</body></html>")
        elif kind == "nested":
            self.answer(200, b"[" * 100_000)
        elif kind == "gzip":
            self.answer(200, b"\x1f\x8b\x08nogzip", {"content-encoding": "gzip"})
        elif kind == "filter":
            self.answer(400, {"error": {"message": "The request was blocked.", "code": "blocked"}})
        elif kind == "wall":
            self.answer(403, b"<html>Request blocked</html>")
        elif kind == "dribble":
            self.transport.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
            self.dribble()
        else:
            if kind == "empty":
                message["content"] = ""
            elif kind == "refusal":
                message |= {"content": None, "refusal": "I cannot judge that."}
            elif kind == "no_usage":
                del reply["usage"]
            elif kind == "huge_usage":
                reply["usage"]["prompt_tokens"] = 10**30
            elif kind == "model":
                reply["model"] = order["model"]
            elif kind == "no_model":
                del reply["model"]
            self.answer(200, reply, self.endpoint.headers)

    def dribble(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(b" ")
            asyncio.get_running_loop().call_later(0.05, self.dribble)

    def completion(self, content: Any, prompt: str, text: str) -> dict[str, Any]:
        tokens_in = sum(len(m["content"]) // 4 + 4 for m in content["messages"])
        return {
            "id": "chatcmpl-1",
            "object": "chat.completion",
            "created": 1,
            "model": content["model"],
            "system_fingerprint": "fp_1",
            "choices": [
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
            ],
            "usage": {
                "prompt_tokens": tokens_in,
                "completion_tokens": 10,
                "total_tokens": tokens_in + 10,
                "prompt_tokens_details": {"cached_tokens": 2},
            },
        }

    def answer(
        self, status: int, content: Any, headers: dict[str, str] | None = None, cut: str | None = None
    ) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        size = len(body)
        if cut is not None:
            body = body[: len(body) // 2]
        if cut == "body":  # as from a proxy: complete HTTP, half the JSON
            size = len(body)
        head = {"content-type": "application/json", "content-length": str(size), **(headers or {})}
        lines = "".join(f"{name}: {value}\r\n" for name, value in head.items())
        self.transport.write(f"HTTP/1.1 {status} X\r\n{lines}\r\n".encode() + body)
        if cut == "connection":
            self.transport.close()


class Running:
    """A running endpoint, as tests see it."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self.log = log

    def control(self, **orders: Any) -> None:
        """Change what applies to all requests: ``every``, ``outage_after``, ``latency``, ``headers``, …."""
        url = self.url.removesuffix("/v1") + "/control"
        urlopen(Request(url, json.dumps(orders).encode(), method="POST")).close()

    def lines(self, event: str = "received") -> list[dict[str, Any]]:
        """The log's lines of one event so far."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line for line in lines if line["event"] == event]

    def counts(self, event: str = "received") -> Counter[str]:
        """The number of requests for each prompt."""
        return Counter(line["prompt"] for line in self.lines(event))


@contextlib.contextmanager
def running(log: Path, latency: float = 0.0, key: str | None = None) -> Iterator[Running]:
    """Start an endpoint, wait for its URL, kill it afterwards."""
    command = [sys.executable, "-S", __file__, "--log", str(log), "--latency", str(latency)]
    if key is not None:
        command += ["--key-sha256", hashlib.sha256(key.encode()).hexdigest()]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url, "the endpoint did not start"
            yield Running(url, log)
        finally:
            process.kill()


async def serve(options: argparse.Namespace) -> None:
    endpoint = Endpoint(options.log, options.latency, options.key_sha256)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(endpoint), "127.0.0.1", 0, backlog=512)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--key-sha256")
    asyncio.run(serve(parser.parse_args()))
