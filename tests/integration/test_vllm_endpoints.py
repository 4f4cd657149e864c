"""Sampling from two real vLLM servers on the CPU, compared with the embedded engine."""

from __future__ import annotations

import contextlib
import json
import re
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from resources.engines.endpoints.sampler import EndpointsSampler
from resources.engines.sampler import Decoding, Request, SamplerError
from resources.engines.transformers.sampler import TransformersSampler
from tests import forked
from tests.integration.conftest import new_place
from tests.integration.model_server import server
from tests.resources.engines import tiny_models, vllm_models

pytest.importorskip("openai", reason="needs the extra `judges`")

pytestmark = pytest.mark.usefixtures("quick")
REQUESTS = [
    Request("def add(a, b):", (1, 2, 3)),
    Request("for name in", (4,)),
    Request("class Thing:\n    value", (5, 6, 7, 8, 2**64 - 1)),
]
GREEDY = Decoding(temperature=0, max_new_tokens=16)
WARM = Decoding(temperature=1.0, top_p=0.95, top_k=200, max_new_tokens=12)
CONTEXT = 512
DEVELOPMENT = {"VLLM_SERVER_DEV_MODE": "1"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, tokenizer = tmp_path_factory.mktemp("models"), tiny_models.tokenizer()
    grown = tiny_models.tokenizer()
    grown.add_tokens(["<|worst|>"])
    return {
        "base": vllm_models.save(root / "base", "llama", tokenizer, context=CONTEXT),
        "trained": vllm_models.save(root / "trained", "llama", tokenizer, seed=1, context=CONTEXT),
        "grown": vllm_models.save(root / "grown", "llama", grown, seed=2, context=CONTEXT),
    }


@pytest.fixture(scope="module")
def servers(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, forked.Popen]]:
    """URL → process of two servers, which start at the same time."""
    vllm_models.needed()
    logs = tmp_path_factory.mktemp("logs")
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        opened = [server(folders["base"], logs / f"{i}.log", environment=DEVELOPMENT) for i in range(2)]
        yield dict(pool.map(stack.enter_context, opened))


@pytest.fixture(scope="module")
def engine(servers: dict[str, forked.Popen]) -> Iterator[EndpointsSampler]:
    with EndpointsSampler(list(servers)) as opened:
        yield opened


@pytest.fixture(scope="module")
def embedded() -> Iterator[TransformersSampler]:
    with TransformersSampler(threads=1, batch_size=64) as opened:
        yield opened


def agree(engine: EndpointsSampler, embedded: TransformersSampler, folder: Path) -> None:
    """Asserts that both engines give the same results for a model, except for random draws."""
    vllm_models.same(engine.generate(folder, REQUESTS, GREEDY), embedded.generate(folder, REQUESTS, GREEDY))
    drawn = engine.generate(folder, REQUESTS, WARM)
    ids = tiny_models.tokenizer()("x" * 2 * CONTEXT)["input_ids"][: CONTEXT - 1]
    full = tiny_models.tokenizer().decode(ids)  # fills the context to the last position
    pairs = [(r.prompt, one.text) for r, row in zip(REQUESTS, drawn, strict=True) for one in row]
    pairs += [("y", full), ("x", ""), ("x", "y"), ("class Thing:\n", "<|end|>")]
    ours, theirs = engine.logprobs(folder, pairs), embedded.logprobs(folder, pairs)
    assert [count for _, count in ours] == [count for _, count in theirs]
    assert [total for total, _ in ours] == pytest.approx([total for total, _ in theirs], abs=1e-4)


def post(url: str, path: str, body: object) -> None:
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=60).close()


def reload_weights(url: str, folder: Path) -> None:
    """Changes a server's weights, as another client might."""
    post(url, "/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})


def test_servers_match_the_embedded_engine(
    folders: dict[str, Path], engine: EndpointsSampler, embedded: TransformersSampler
) -> None:
    assert engine.engine_version.startswith("vllm-") and engine.engine_version.endswith("+float32")
    agree(engine, embedded, folders["base"])
    assert engine.left_out == {} and not engine.on_accelerator and engine.load_seconds > 0


def test_seed_reproduces_its_completion(folders: dict[str, Path], engine: EndpointsSampler) -> None:
    seen: list[tuple[int, int]] = []
    rows = engine.generate(folders["base"], REQUESTS, WARM, lambda done, total: seen.append((done, total)))
    assert [len(row) for row in rows] == [3, 1, 5]
    assert len({one.text for row in rows for one in row}) == 9
    assert seen[-1] == (9, 9) and seen == sorted(seen)
    (alone,) = engine.generate(folders["base"], [Request(REQUESTS[2].prompt, (7, 6))], WARM)
    assert [one.text for one in alone] == [rows[2][2].text, rows[2][1].text]


def test_stop_reasons_lengths_and_banned_tokens(folders: dict[str, Path], engine: EndpointsSampler) -> None:
    request = [Request("def", tuple(range(40)))]
    (free,) = engine.generate(folders["base"], request, Decoding(temperature=2.0, max_new_tokens=60))
    assert {one.finish_reason for one in free} == {"stop", "length"}
    for one in free:
        assert one.n_tokens == 60 if one.finish_reason == "length" else one.n_tokens <= 60
        assert "<|end|>" not in one.text
    fixed = Decoding(temperature=2.0, max_new_tokens=30, ignore_eos=True, banned_tokens=("(", "e"))
    for one in engine.generate(folders["base"], request, fixed)[0]:
        assert (one.finish_reason, one.n_tokens) == ("length", 30)
        assert "(" not in one.text


def test_structured_output(
    folders: dict[str, Path], engine: EndpointsSampler, embedded: TransformersSampler
) -> None:
    def bits(tokens: int) -> Decoding:
        return Decoding(1.5, max_new_tokens=tokens, structured={"regex": "[01]{6}"})

    rows = engine.generate(folders["base"], REQUESTS, bits(24))
    assert all(re.fullmatch("[01]{6}", one.text) and one.n_tokens == 7 for row in rows for one in row)
    assert {one.finish_reason for row in rows for one in row} == {"stop"}
    assert engine.generate(folders["base"], REQUESTS, bits(24)) == rows
    for request, row in zip(REQUESTS, engine.generate(folders["base"], REQUESTS, bits(5)), strict=True):
        theirs = embedded.logprobs(folders["base"], [(request.prompt, one.text) for one in row])
        assert {one.finish_reason for one in row} == {"length"}
        assert [one.logprob for one in row] == pytest.approx([total for total, _ in theirs], abs=1e-4)
    (same,) = engine.generate(
        folders["base"], REQUESTS[:1], Decoding(1.5, structured={"choice": ["a b", "c"]})
    )
    assert {one.text for one in same} <= {"a b", "c"}
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    decoding = Decoding(
        1.0, max_new_tokens=200, structured={"json_schema": {**schema, "additionalProperties": False}}
    )
    replies = engine.generate(folders["base"], REQUESTS, decoding)
    parsed = [json.loads(one.text)["n"] for row in replies for one in row if one.finish_reason == "stop"]
    assert parsed and set(parsed) <= {1, 2}
    with pytest.raises(SamplerError, match=r"^sampling.structured: http.* refuses a request \(HTTP 400"):
        engine.generate(folders["base"], REQUESTS, Decoding(1.0, structured={"grammar": "root ::= nobody"}))


def test_weights_are_switched_to_each_checkpoint(
    folders: dict[str, Path], engine: EndpointsSampler, embedded: TransformersSampler
) -> None:
    agree(engine, embedded, folders["trained"])
    agree(engine, embedded, folders["base"])  # and back


def test_weights_changed_by_another_client_are_restored(
    servers: dict[str, forked.Popen],
    folders: dict[str, Path],
    engine: EndpointsSampler,
    embedded: TransformersSampler,
) -> None:
    engine.generate(folders["base"], REQUESTS, GREEDY)
    reload_weights(list(servers)[1], folders["trained"])  # the server still reports the base policy
    agree(engine, embedded, folders["base"])


def test_weights_that_change_while_sampling_raise_an_error(
    servers: dict[str, forked.Popen], folders: dict[str, Path], engine: EndpointsSampler
) -> None:
    changed: list[int] = []

    def change(done: int, total: int) -> None:
        if not changed:
            changed.append(done)
            reload_weights(next(iter(servers)), folders["trained"])

    many = [Request("def add(a, b):", tuple(range(600)))]
    expected = engine.generate(folders["base"], many, WARM)
    try:
        drawn = engine.generate(folders["base"], many, WARM, change)
    except SamplerError as error:
        assert re.search(r"weights of http.* were changed while it sampled from .*base", str(error))
    else:  # a busy server has dropped a connection: all of its results are discarded
        assert list(engine.left_out) == [next(iter(servers))] and drawn == expected


def test_unsupported_requests_are_refused(folders: dict[str, Path], engine: EndpointsSampler) -> None:
    with pytest.raises(
        SamplerError, match=r"no server .* not those of .*grown; start another server with that"
    ):
        engine.generate(folders["grown"], REQUESTS, GREEDY)
    with pytest.raises(SamplerError, match=r"prompt 1 \('a b c d e.* tokens and 40 more.*holds 512 tokens"):
        engine.generate(
            folders["base"],
            [REQUESTS[0], Request("a b c d e " * 200, (1,))],
            Decoding(1.0, max_new_tokens=40),
        )
    with pytest.raises(SamplerError, match="temperature is 3, but vLLM samples at 0"):
        engine.generate(folders["base"], REQUESTS, Decoding(3.0, max_new_tokens=4))
    with pytest.raises(SamplerError, match=r"'def add\(' is \d+ tokens"):
        engine.generate(
            folders["base"], REQUESTS, Decoding(1.0, max_new_tokens=4, banned_tokens=("def add(",))
        )


def test_loop_with_sampling_from_servers(
    servers: dict[str, forked.Popen], folders: dict[str, Path], tmp_path: Path
) -> None:
    place = new_place(tmp_path / "place")
    settings = (
        "sampling.engine=endpoints",
        f"sampling.endpoints.urls=[{', '.join(servers)}]",
        f"policy.model={folders['base']}",
    )
    engine = [word for setting in settings for word in ("--set", setting)]
    done = place.textalign("run", "toy", "--no-control", *engine, "--set", "sampling.chunk=5")
    name = next(word.split("|")[0] for word in done.stdout.split() if "|002" in word)
    policies = []
    for iteration in (1, 2):
        artifact = place.artifact(name, iteration, "generations")
        rows = artifact.frame("generations")
        assert set(rows["engine"]) == {"endpoints"} and set(rows["n_tokens"]) == {8}
        assert len(artifact.manifest["facts"]["chunks"]) == 4
        assert set(artifact.manifest["facts"]["part_seconds"]) == {"load", "generate"}
        assert "perplexity" in set(place.frame(name, iteration, "evaluation", "scores")["metric"])
        policies.append(rows["policy_hash"][0])
    assert len(set(policies)) == 2


def test_a_server_without_adapters_is_left_out(
    servers: dict[str, forked.Popen], folders: dict[str, Path]
) -> None:
    """Detected with the base policy, before there is any adapter."""
    with (
        EndpointsSampler([next(iter(servers))], adapters=True) as sampler,
        pytest.raises(SamplerError, match=r"it takes no adapters; start it with .*--lora-target-modules"),
    ):
        sampler.generate(folders["base"], REQUESTS, GREEDY)


def test_no_samples_are_lost_when_a_server_dies(
    servers: dict[str, forked.Popen], folders: dict[str, Path], engine: EndpointsSampler
) -> None:
    many = [Request(f"for name in {word}", tuple(range(100))) for word in ("names", "range", "x", "self")]
    short = Decoding(temperature=1.0, max_new_tokens=8)
    whole = engine.generate(folders["base"], many, short)
    url, process = list(servers.items())[1]
    seen: list[int] = []

    def kill(done: int, total: int) -> None:
        if not seen:
            process.stop()
        seen.append(done)

    assert engine.generate(folders["base"], many, short, kill) == whole
    assert list(engine.left_out) == [url] and seen[0] < 400 == seen[-1]
