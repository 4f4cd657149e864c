"""Adapters served by vLLM: a real engine on the CPU, compared with the embedded one on merged weights."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from resources.engines.sampler import Adapted, Decoding, Model, Request, SamplerError
from resources.engines.transformers.sampler import TransformersSampler
from resources.engines.vllm.adapters import content_of, linear_modules
from resources.engines.vllm.sampler import VllmSampler
from tests.resources.engines import tiny_models, vllm_models
from tests.resources.engines.random_adapters import Adapter, save_adapter

pytestmark = pytest.mark.usefixtures("quick")

peft = pytest.importorskip("peft", reason="the extra `lora` is not installed")

LONG = "class Thing:\n    value = 3  # a number\n" * 20  # longer than a block of vLLM's cache
REQUESTS = [Request("def add(a, b):", (1, 2)), Request("for name in", (3,)), Request(LONG, (4, 5, 6))]
PAIRS = [("def add(a, b):", "\n    return a"), (LONG, "x"), (LONG, "class Thing"), ("y", "")]
GREEDY = Decoding(temperature=0, max_new_tokens=16)
WARM = Decoding(temperature=1.0, top_p=0.95, max_new_tokens=12)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vllm_models.save(
        tmp_path_factory.mktemp("models") / "base", "llama", tiny_models.tokenizer(), context=1024
    )


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Adapter]:
    return [save_adapter(base, tmp_path_factory.mktemp(f"adapter{seed}"), seed) for seed in range(3)]


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmSampler]:
    vllm_models.needed()
    with VllmSampler(threads=1, batch_size=64, max_lora_rank=3) as opened:
        yield opened


def agree(engine: VllmSampler, embedded: TransformersSampler, served: Model, merged: Path) -> None:
    """Assert that both engines generate the same greedy tokens and give texts the same log-probabilities."""
    ours, theirs = engine.generate(served, REQUESTS, GREEDY), embedded.generate(merged, REQUESTS, GREEDY)
    vllm_models.same(ours, theirs, within=1e-3)
    scored, expected = engine.logprobs(served, PAIRS), embedded.logprobs(merged, PAIRS)
    assert [count for _, count in scored] == [count for _, count in expected]
    assert [total for total, _ in scored] == pytest.approx([total for total, _ in expected], abs=1e-3)


def test_served_adapters_match_merged_weights(
    engine: VllmSampler, embedded: TransformersSampler, base: Path, adapters: list[Adapter]
) -> None:
    """One engine, with and without adapters in turn: none reads what another has left in the prefix cache."""
    one, two, three = adapters
    agree(engine, embedded, base, base)
    started = vllm_models.process(engine)
    for adapter in (one, two, one, three):
        agree(engine, embedded, adapter.served, adapter.merged)
    agree(engine, embedded, base, base)
    agree(engine, embedded, two.served, two.merged)
    assert vllm_models.process(engine) == started
    # The three differ from each other and from the base.
    totals = [engine.logprobs(adapter, PAIRS)[0][0] for adapter in (base, *(a.served for a in adapters))]
    assert min(abs(a - b) for i, a in enumerate(totals) for b in totals[:i]) > 0.01


def test_served_adapters_match_merged_weights_in_vllm_itself(
    engine: VllmSampler, adapters: list[Adapter]
) -> None:
    served = engine.generate(adapters[0].served, REQUESTS, WARM)
    assert engine.generate(adapters[0].served, REQUESTS, WARM) == served
    with VllmSampler(threads=1, batch_size=64) as plain:
        assert "adapters" in engine.engine_version and "adapters" not in plain.engine_version
        merged = plain.generate(adapters[0].merged, REQUESTS, WARM)
        with pytest.raises(
            SamplerError, match=r"engine vllm was not started for adapters; set sampling.adapters"
        ):
            plain.generate(adapters[0].served, REQUESTS, WARM)
    assert [[completion.text for completion in row] for row in merged] == [
        [completion.text for completion in row] for row in served
    ]


def test_another_adapter_in_the_same_folder(
    engine: VllmSampler, embedded: TransformersSampler, base: Path, adapters: list[Adapter], tmp_path: Path
) -> None:
    place = Adapted(base, Path(shutil.copytree(adapters[0].served.adapter, tmp_path / "adapter")))
    agree(engine, embedded, place, adapters[0].merged)
    name = content_of(place.adapter)
    shutil.copytree(adapters[1].served.adapter, place.adapter, dirs_exist_ok=True)
    assert content_of(place.adapter) != name
    agree(engine, embedded, place, adapters[1].merged)


def test_other_base_weights_under_the_adapter(
    engine: VllmSampler, embedded: TransformersSampler, base: Path, adapters: list[Adapter], tmp_path: Path
) -> None:
    agree(engine, embedded, adapters[0].served, adapters[0].merged)
    started = vllm_models.process(engine)
    other = vllm_models.save(tmp_path / "other", "llama", tiny_models.tokenizer(), seed=7, context=1024)
    agree(engine, embedded, other, other)
    adapter = save_adapter(other, tmp_path, 5)
    agree(engine, embedded, adapter.served, adapter.merged)
    agree(engine, embedded, adapters[0].served, adapters[0].merged)
    assert vllm_models.process(engine) == started


def test_adapters_that_cannot_be_served_are_reported(
    engine: VllmSampler, embedded: TransformersSampler, base: Path, adapters: list[Adapter], tmp_path: Path
) -> None:
    engine.generate(base, REQUESTS, GREEDY)
    started = vllm_models.process(engine)
    large = save_adapter(base, tmp_path / "large", 0, rank=9)
    with pytest.raises(
        SamplerError, match=r"cannot serve the adapter .*rank 9 is greater than max_lora_rank 8"
    ):
        engine.generate(large.served, REQUESTS, GREEDY)
    head = save_adapter(base, tmp_path / "head", 0, targets=["q_proj", "lm_head"])
    with pytest.raises(SamplerError, match=r"would leave out parts of the adapter .* \(lm_head"):
        engine.logprobs(head.served, PAIRS)
    with pytest.raises(SamplerError, match=r"nowhere is not a folder; train the checkpoint again"):
        engine.logprobs(Adapted(base, tmp_path / "nowhere"), PAIRS)
    with pytest.raises(SamplerError, match=r"engine transformers was not started for adapters"):
        embedded.logprobs(adapters[0].served, PAIRS)
    agree(engine, embedded, adapters[2].served, adapters[2].merged)
    assert vllm_models.process(engine) == started


def test_all_linear_matches_peft(base: Path, adapters: list[Adapter]) -> None:
    modules = peft.LoraConfig.from_pretrained(str(adapters[0].served.adapter)).target_modules
    assert linear_modules(base, trust_remote_code=False) == sorted({name.split(".")[-1] for name in modules})
