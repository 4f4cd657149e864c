"""Which server gets a request and which is left out, with servers that answer by rule. Real ones: tests/integration."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

pytest.importorskip("openai", reason="needs the extra `judges`")

from resources.engines.endpoints.engine import Engine
from resources.engines.endpoints.servers import EndpointError, Endpoints, Server, ServerFault, connected
from resources.engines.endpoints.weights import have, label_of, still_has
from resources.engines.endpoints.worker import every
from textalign_dagster import PROJECT
from textalign_dagster.cli import preflight
from textalign_dagster.experiment.files import Library
from textalign_dagster.settings import SettingsError
from textalign_dagster.settings.sampling import Sampling

Rule = Callable[[str, dict[str, Any]], tuple[int, Any]]
"""(path, body) → status and answer; a status of 0 hangs up."""


@contextlib.contextmanager
def server(rule: Rule) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.do_POST()

        def do_POST(self) -> None:
            length = int(self.headers.get("content-length") or 0)
            status, answer = rule(self.path, json.loads(self.rfile.read(length) or b"{}"))
            if not status:
                self.close_connection = True
                return
            data = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: Any) -> None: ...

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listening.daemon_threads = True
    thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{listening.server_address[1]}"
    listening.shutdown()
    thread.join()
    listening.server_close()


def completion(name: str, finish: str = "stop") -> tuple[int, Any]:
    return 200, {"choices": [{"text": name, "finish_reason": finish}]}


def answers_of(urls: list[str], count: int, at_once: int) -> tuple[list[str], dict[str, str]]:
    """The answers to ``count`` requests, in request order, and the servers that were left out."""

    async def run() -> tuple[list[str], dict[str, str]]:
        answers: dict[int, str] = {}
        left = iter(range(count))

        async def work() -> None:
            for index in left:
                answers[index] = (await endpoints.complete({"prompt": [index]}))[1]["text"]

        async with connected(urls, key=None, timeout_s=10, connections=at_once) as endpoints:
            try:
                async with asyncio.TaskGroup() as group:
                    for _ in range(at_once):
                        group.create_task(work())
            except BaseExceptionGroup as several:
                raise several.exceptions[0] from None
            return [answers[index] for index in range(count)], endpoints.left_out

    return asyncio.run(run())


def test_requests_go_to_the_least_busy_server() -> None:
    quick_prompts, nine_answered = [], threading.Event()

    def slow(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        assert nine_answered.wait(20), "the quick server did not get the other nine requests meanwhile"
        return completion("slow")

    def quick(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        quick_prompts.append(body["prompt"])
        if len(quick_prompts) == 9:
            nine_answered.set()
        return completion("quick")

    with server(slow) as one, server(quick) as other:
        answers, left_out = answers_of([one, other], 10, at_once=2)
    assert sorted(answers) == ["quick"] * 9 + ["slow"] and left_out == {}


def test_equal_servers_get_equal_shares() -> None:
    with server(lambda *_: completion("a")) as one, server(lambda *_: completion("b")) as other:
        answers, _ = answers_of([one, other], 10, at_once=1)
    assert answers == ["a", "b"] * 5


def test_requests_of_a_dead_server_go_to_others() -> None:
    seen: list[int] = []

    def dies(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        seen.append(body["prompt"][0])
        return completion("first") if len(seen) < 3 else (0, None)

    with server(dies) as one, server(lambda *_: completion("second")) as other:
        answers, left_out = answers_of([one, other], 40, at_once=8)
        assert answers.count("first") == 2 and answers.count("second") == 38
        assert list(left_out) == [one] and left_out[one].startswith("no connection (")
        assert len(seen) <= 2 + 8  # those in flight, and none afterwards


@pytest.mark.parametrize("when", ["while it samples", "when it is looked at again"])
def test_answers_of_a_server_that_failed_later_are_discarded(when: str) -> None:
    """It may have had other weights when it answered: only the check at the end can tell."""
    seen: list[int] = []

    def dies(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        seen.append(body["prompt"][0])
        return completion("first") if when != "while it samples" or len(seen) < 5 else (0, None)

    class Policy:
        settings: ClassVar = {"batch_size": 2}
        checks = 0

        async def unchanged(self, endpoints: Endpoints) -> None:
            self.checks += 1
            if when != "while it samples" and self.checks == 1:
                endpoints.servers[0].failed = "no connection"

    async def run(urls: list[str]) -> list[Any]:
        async with connected(urls, key=None, timeout_s=10, connections=4) as endpoints:
            bodies = [{"prompt": [index]} for index in range(20)]
            read: Any = lambda choice, index: (index, choice["text"])  # noqa: E731
            return await every(policy, endpoints, bodies, read, counted.append)  # type: ignore[arg-type]

    policy, counted = Policy(), list[int]()
    with server(dies) as one, server(lambda *_: completion("second")) as other:
        assert asyncio.run(run([one, other])) == [(index, "second") for index in range(20)]
    assert len(seen) >= 5 and policy.checks == 2 and counted[-1] == 20


def test_a_server_is_left_out_after_consecutive_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resources.engines.endpoints.servers.BASE_S", 0.0)
    answered = {"bad": 0, "shaky": 0}

    def bad(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        answered["bad"] += 1
        return 500, {"error": {"message": "EngineCore encountered an issue"}}

    def shaky(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        answered["shaky"] += 1  # aborted, rate-limited, then answered, over and over
        if answered["shaky"] % 3:
            return completion("shaky", "abort") if answered["shaky"] % 3 == 1 else (429, {"error": "busy"})
        return completion("shaky")

    with server(bad) as one, server(shaky) as other:
        answers, left_out = answers_of([one, other], 6, at_once=1)
    assert answers == ["shaky"] * 6
    assert left_out == {one: "HTTP 500: EngineCore encountered an issue"}
    assert answered["bad"] == 3


def test_a_request_that_always_fails_ends_the_call_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """While other requests succeed, its failures are never three in a row."""
    monkeypatch.setattr("resources.engines.endpoints.servers.BASE_S", 0.0)

    def poisoned(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if body["prompt"] == [7, 7]:
            time.sleep(0.02)  # others are answered meanwhile
            return 500, {"error": {"message": "unlucky"}}
        return completion("fine")

    async def run(url: str) -> None:
        async with connected([url], key=None, timeout_s=10, connections=4) as endpoints:
            done = asyncio.Event()

            async def others() -> None:
                while not done.is_set():
                    await endpoints.complete({"prompt": [1]})

            async with asyncio.TaskGroup() as group:
                group.create_task(others())
                with pytest.raises(EndpointError, match=r"answers other requests.*2 prompt tokens.*unlucky"):
                    await endpoints.complete({"prompt": [7, 7]})
                done.set()

    with server(poisoned) as one:
        asyncio.run(run(one))


def test_when_all_servers_are_gone_the_error_gives_each_reason() -> None:
    with (
        server(lambda *_: (0, None)) as one,
        pytest.raises(EndpointError, match=r"no server of sampling.endpoints.urls can be used") as caught,
    ):
        answers_of([one, "http://127.0.0.1:9"], 5, at_once=3)
    assert f"{one}: no connection (" in str(caught.value)
    assert "http://127.0.0.1:9: no connection (" in str(caught.value)
    assert str(caught.value).endswith("run this again: finished chunks are kept")


def test_a_refused_request_is_not_retried_elsewhere() -> None:
    paths: list[str] = []

    def refuses(path: str, body: dict[str, Any]) -> tuple[int, Any]:
        paths.append(path)
        return 400, {"message": "logit_bias out of range"}

    with (
        server(refuses) as one,
        server(refuses) as other,
        pytest.raises(EndpointError, match=r"refuses a request \(HTTP 400: .*logit_bias out of range"),
    ):
        answers_of([one, other], 3, at_once=1)
    assert paths == ["/v1/completions"]


class Fake:
    """A server that reports its weights; ``changes`` lists the calls that changed them."""

    def __init__(self, root: Path, *, development: bool = True, version: str = "default") -> None:
        self.root, self.development, self.version = root, development, version
        self.changes: list[str] = []

    def __call__(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/completions":
            terms = {str(token): {"logprob": -2.0} for token in body["prompt"]}
            last = {f"token_id:{body['logprob_token_ids'][0]}": -3.0}
            choice = {"prompt_logprobs": [None, *([terms] * 9)][: len(body["prompt"])]}
            return 200, {"choices": [{**choice, "logprobs": {"top_logprobs": [last]}}]}
        if path == "/v1/models":
            own = {"id": "x", "root": str(self.root), "max_model_len": 64, "parent": None}
            return 200, {"data": [own, {**own, "id": "adapter", "parent": "x"}]}
        if not self.development:
            return 404, {"detail": "Not Found"}
        if path == "/weight_info":
            return 200, {"weight_version": self.version}
        self.changes.append(path)
        if path == "/collective_rpc":
            assert body == {"method": "reload_weights", "kwargs": {"weights_path": str(self.target)}}
            return 200, {"results": [None]}
        if path == "/update_weight_version":
            self.version = body["new_version"]
        return 200, {}

    target = Path()


def prepared(fake: Fake, folder: Path) -> tuple[Server, bool]:
    """A server that was given a folder's weights, and whether it still reports them."""
    fake.target = folder

    async def run(url: str) -> tuple[Server, bool]:
        async with connected([url], key=None, timeout_s=10, connections=2) as endpoints:
            (one,) = endpoints.servers
            await have(one, folder, label_of(folder, "files"))
            return one, await still_has(one, label_of(folder, "files"))

    with server(fake) as url:
        return asyncio.run(run(url))


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Folders that look like models: two with the same shapes, and one with more tokens."""
    folders = {}
    for name, rows in (("base", 4), ("trained", 4), ("grown", 5)):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        (folders[name] / "config.json").write_text(json.dumps({"vocab_size": rows}))
        header = json.dumps({"w": {"dtype": "F32", "shape": [rows], "data_offsets": [0, 4 * rows]}}).encode()
        (folders[name] / "model.safetensors").write_bytes(
            len(header).to_bytes(8, "little") + header + bytes(4 * rows)
        )
    return folders


def test_a_server_loads_the_policys_weights(folders: dict[str, Path]) -> None:
    fake = Fake(folders["base"])
    one, same = prepared(fake, folders["trained"])
    assert (one.model, one.room, same) == ("x", 64, True)
    steps = ["/collective_rpc", "/reset_prefix_cache", "/update_weight_version"]
    assert fake.changes == steps
    prepared(fake, folders["trained"])
    assert fake.changes == steps  # it already has them
    prepared(fake, folders["base"])
    assert fake.changes == steps * 2  # it no longer has the weights it was started with


def test_weights_that_cannot_be_served_are_reported(folders: dict[str, Path]) -> None:
    frozen = Fake(folders["base"], development=False)
    assert prepared(frozen, folders["base"])[1]  # it still has the weights it was started with
    with pytest.raises(
        ServerFault, match=r"serves .*base, not .*trained, .*start it with VLLM_SERVER_DEV_MODE=1"
    ):
        prepared(frozen, folders["trained"])
    other = Fake(folders["base"])
    with pytest.raises(ServerFault, match=r"weight shapes are not those of .*grown; start another server"):
        prepared(other, folders["grown"])
    assert other.changes == []  # weights of another shape would have crashed it
    with pytest.raises(ServerFault, match=r"it serves org/model, which is not a folder on this machine"):
        prepared(Fake(Path("org/model")), folders["base"])


@pytest.mark.parametrize(
    ("expected", "known", "loads"),
    [
        ([-2.0, -2.001, -3.0], None, 1),  # as computed by transformers
        (None, [-2.0, -2.0, -3.0], 1),  # nothing to compare with; same as before
        (None, [-2.0, -2.1, -3.0], 2),  # changed since
        ([-2.0, -2.0, -4.0], None, None),  # it does not have these weights, whatever is loaded
    ],
)
def test_a_probe_text_shows_which_weights_a_server_has(
    folders: dict[str, Path], expected: list[float] | None, known: list[float] | None, loads: int | None
) -> None:
    fake = Fake(folders["base"])
    fake.target = folders["trained"]
    engine = Engine({"verify": expected is not None, "dtype": "float32", "adapters": False})
    engine.folder, engine.label, engine.probed = folders["trained"], "trained#1", [7, 8, 9, 6]
    engine.expected = expected

    async def run(url: str) -> dict[str, list[float]]:
        if known is not None:
            engine.known[url, engine.label] = known
        async with connected([url], key=None, timeout_s=10, connections=2) as endpoints:
            await engine.use(endpoints)
            await engine.unchanged(endpoints)
            fake.version = "somebody else's"
            with pytest.raises(EndpointError, match=r"weights of http.* were changed while it sampled"):
                await engine.unchanged(endpoints)
            return engine.said

    with server(fake) as url:
        if loads is None:
            with pytest.raises(
                EndpointError, match=r"finds a text 0.33 nats per token .* than transformers does"
            ):
                asyncio.run(run(url))
        else:
            assert asyncio.run(run(url)) == {url: [-2.0, -2.0, -3.0]}
            assert engine.context == 64
            assert fake.changes.count("/collective_rpc") == loads


def test_endpoint_settings() -> None:
    Sampling.model_validate({"engine": "endpoints", "endpoints": {"urls": ["http://a:8000", "https://b"]}})
    for content, message in (
        ({"endpoints": {"urls": ["http://a"]}}, "endpoints: only for `engine: endpoints`, not transformers"),
        ({"engine": "endpoints"}, "`engine: endpoints` needs"),
        ({"engine": "endpoints", "endpoints": {"urls": []}}, "at least 1 item"),
        ({"engine": "endpoints", "endpoints": {"urls": ["a:8000"]}}, "'a:8000' is not a URL of a server"),
        ({"engine": "endpoints", "endpoints": {"urls": ["http://u:secret@a"]}}, "of a carries credentials"),
        ({"engine": "endpoints", "endpoints": {"urls": ["http://a", "http://a"]}}, "is listed twice"),
    ):
        with pytest.raises(ValueError, match=message):
            Sampling.model_validate(content)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (lambda path, _: (200, {"version": "0.32.0"}), None),
        (lambda path, _: (404, {}) if path == "/weight_info" else (200, {"version": "0.32.0"}),
         r"HTTP 404 at http.*/weight_info\); it must be vLLM, started with VLLM_SERVER_DEV_MODE=1"),
        (lambda path, _: (200, []), "no server answers"),
    ],
)  # fmt: skip
def test_preflight_looks_for_the_servers(toys: Path, rule: Rule, message: str | None) -> None:
    library = Library((toys, PROJECT / "experiments"))
    with server(rule) as url:
        overrides = ["sampling.engine=endpoints", f"sampling.endpoints.urls=[{url}/v1, http://127.0.0.1:9]"]
        if message is None:
            lines = preflight.preflight(library, "toy", overrides)
            assert f"engine: vLLM 0.32.0 at {url}/v1" in lines
            assert any(line.startswith("engine: no answer at http://127.0.0.1:9 (") for line in lines)
        else:
            with pytest.raises(SettingsError, match=message) as caught:
                preflight.preflight(library, "toy", overrides)
            assert "toy.yaml: sampling.endpoints.urls: " in str(caught.value)


def test_server_addresses_do_not_change_the_samples(toys: Path) -> None:
    from textalign_dagster.loop.stages import stage_settings

    library = Library((toys, PROJECT / "experiments"))
    one, other = (
        library.overridden("toy", ["sampling.engine=endpoints", f"sampling.endpoints.urls=[{url}]", *more])
        for url, more in (("http://a", []), ("http://b", ["sampling.chunk=2", "sampling.batch_size=3"]))
    )
    for stage in ("generations", "evaluation"):
        assert stage_settings(one, stage, 1) == stage_settings(other, stage, 1)
