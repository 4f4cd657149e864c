"""Adapters on a real vLLM server on the CPU, compared with the embedded engine with merged weights."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from resources.engines.endpoints.sampler import EndpointsSampler
from resources.engines.sampler import Decoding, Model, Request, SamplerError
from resources.engines.transformers.sampler import TransformersSampler
from tests.integration.conftest import new_place
from tests.integration.model_server import server
from tests.resources.engines import tiny_models, vllm_models
from tests.resources.engines.random_adapters import Adapter, save_adapter

pytest.importorskip("openai", reason="needs the extra `judges`")
pytest.importorskip("peft", reason="needs the extra `lora`")

pytestmark = pytest.mark.usefixtures("quick")
REQUESTS = [Request("def add(a, b):", (1, 2)), Request("for name in", (3,))]
PAIRS = [("def add(a, b):", "\n    return a"), ("class Thing:\n", "x"), ("y", "")]
GREEDY = Decoding(temperature=0, max_new_tokens=16)
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LORA = ("--enable-lora", "--max-lora-rank", "8")
UPDATING = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vllm_models.save(
        tmp_path_factory.mktemp("models") / "base", "llama", tiny_models.tokenizer(), context=512
    )


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    return [save_adapter(base, tmp_path_factory.mktemp(f"adapter{seed}"), seed) for seed in range(2)]


@pytest.fixture(scope="module")
def url(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    vllm_models.needed()
    log = tmp_path_factory.mktemp("logs") / "log"
    options = (*LORA, "--lora-target-modules", *MODULES)
    with server(base, log, *options, environment=UPDATING) as (opened, _):
        yield opened


@pytest.fixture(scope="module")
def engine(url: str) -> Iterator[EndpointsSampler]:
    with EndpointsSampler([url], adapters=True) as opened:
        yield opened


@pytest.fixture(scope="module")
def embedded() -> Iterator[TransformersSampler]:
    with TransformersSampler(threads=1, batch_size=64) as opened:
        yield opened


def agree(engine: EndpointsSampler, embedded: TransformersSampler, served: Model, merged: Path) -> None:
    ours, theirs = engine.generate(served, REQUESTS, GREEDY), embedded.generate(merged, REQUESTS, GREEDY)
    assert [[one.text for one in row] for row in ours] == [[one.text for one in row] for row in theirs]
    for our_row, their_row in zip(ours, theirs, strict=True):
        assert [c.logprob for c in our_row] == pytest.approx([c.logprob for c in their_row], abs=1e-3)
    our_scores, their_scores = engine.logprobs(served, PAIRS), embedded.logprobs(merged, PAIRS)
    assert [total for total, _ in our_scores] == pytest.approx([total for total, _ in their_scores], abs=1e-3)


def served_by(url: str) -> list[str]:
    with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as response:
        return [entry["id"] for entry in json.loads(response.read())["data"]]


def post(url: str, path: str, body: object) -> None:
    request = urllib.request.Request(
        url + path, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    urllib.request.urlopen(request, timeout=60).close()


def test_served_adapters_match_merged_weights(
    url: str, engine: EndpointsSampler, embedded: TransformersSampler, base: Path, adapters: list[Adapter]
) -> None:
    assert engine.engine_version.endswith("+adapters")
    agree(engine, embedded, base, base)
    for adapter in (*adapters, adapters[0]):
        agree(engine, embedded, adapter.served, adapter.merged)
        assert len(served_by(url)) == 2  # earlier adapters are unloaded
    agree(engine, embedded, base, base)
    assert engine.left_out == {}


def test_adapter_changed_by_another_client_is_restored(
    url: str, engine: EndpointsSampler, embedded: TransformersSampler, base: Path, adapters: list[Adapter]
) -> None:
    agree(engine, embedded, adapters[0].served, adapters[0].merged)
    (name,) = (served for served in served_by(url) if served.startswith("adapter-"))
    other = str(adapters[1].served.adapter)
    post(url, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": other, "load_inplace": True})
    agree(engine, embedded, adapters[0].served, adapters[0].merged)


def test_adapter_that_changes_while_sampling_raises_an_error(
    url: str, engine: EndpointsSampler, adapters: list[Adapter]
) -> None:
    changed: list[int] = []

    def change(done: int, total: int) -> None:
        if not changed:
            changed.append(done)
            (name,) = (served for served in served_by(url) if served.startswith("adapter-"))
            other = str(adapters[1].served.adapter)
            post(url, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": other, "load_inplace": True})

    many = [Request("def add(a, b):", tuple(range(300)))]
    with pytest.raises(SamplerError, match=r"weights of http.* were changed while it sampled"):
        engine.generate(adapters[0].served, many, Decoding(1.0, max_new_tokens=12), change)


def test_loop_with_sampling_from_the_server(
    url: str, base: Path, engine: EndpointsSampler, tmp_path: Path
) -> None:
    place = new_place(tmp_path / "place")
    settings = (
        "sampling.engine=endpoints",
        f"sampling.endpoints.urls=[{url}]",
        "sampling.adapters=served",
        "training.lora={rank: 4, adapter: carried}",
        f"policy.model={base}",
    )
    options = [word for setting in settings for word in ("--set", setting)]
    done = place.textalign("run", "toy", "--no-control", *options)
    name = next(word.split("|")[0] for word in done.stdout.split() if "|002" in word)
    rows = [place.frame(name, k, "generations") for k in (1, 2)]
    assert all(frame["engine_version"].str.ends_with("+adapters").all() for frame in rows)
    assert rows[0]["policy_hash"][0] != rows[1]["policy_hash"][0]
