"""Sampling in chunks, with a fake engine that can be interrupted; tests/integration kills a real one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from resources.engines.chunks import CHUNK, Sampled, cut, discard, left_over, sample
from resources.engines.sampler import Completion, Decoding, Progress, Request, SamplerError
from resources.store import ArtifactStore

DECODING = Decoding(temperature=1.0, max_new_tokens=4, banned_tokens=("<|best|>",))
REQUESTS = [Request(f"prompt {index}", tuple(range(index, index + 3))) for index in range(4)]


class Engine:
    """Echoes prompt and seed; records the prompts of each call; fails in call number ``fails``."""

    engine, engine_version, on_accelerator = "echo", "1", False

    def __init__(self, fails: int = 0, version: str = "1") -> None:
        self.fails, self.engine_version = fails, version
        self.load_seconds = 0.0
        self.calls: list[list[str]] = []

    def generate(
        self, model: Path, requests: Sequence[Request], decoding: Decoding, progress: Progress | None = None
    ) -> list[list[Completion]]:
        self.calls.append([request.prompt for request in requests])
        self.load_seconds += 0.001
        if len(self.calls) == self.fails:
            raise SamplerError("the power is off")
        total = sum(len(request.seeds) for request in requests)
        assert progress is not None
        progress(0, total)
        progress(total, total)
        return [
            [
                Completion(f"{model.name}: {r.prompt} é {seed}", 4, "length", -1 / (seed + 3))
                for seed in r.seeds
            ]
            for r in requests
        ]

    def logprobs(self, *_: Any) -> list[tuple[float, int]]:
        raise NotImplementedError

    def close(self) -> None: ...

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: Any) -> None: ...


@pytest.fixture(params=["folder", "object store"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ArtifactStore:
    if request.param == "folder":
        return ArtifactStore(tmp_path / "store")
    return ArtifactStore(f"memory://{tmp_path.name}", cache=tmp_path / "cache")


def run(store: ArtifactStore, engine: Engine, size: int = 6, **changed: Any) -> Sampled:
    options = {"policy_hash": "abc", "decoding": DECODING, "requests": REQUESTS, **changed}
    seen: list[tuple[int, int]] = []
    sampled = sample(
        store, engine, Path("policy"), options["policy_hash"], options["requests"], options["decoding"], size,
        lambda done, total: seen.append((done, total)),
    )  # fmt: skip
    assert seen == sorted(seen) and all(total == 12 for _, total in seen)
    return sampled


def test_chunks_are_cut_between_requests() -> None:
    assert [len(part) for part in cut(REQUESTS, 7)] == [2, 2]
    assert [len(part) for part in cut(REQUESTS, 2)] == [1, 1, 1, 1]  # a request is never split
    assert [len(part) for part in cut(REQUESTS, 12)] == [4]
    assert list(cut([], 5)) == []


@pytest.mark.parametrize("size", [1, 3, 5, 6, 11, 12, 100])
def test_chunk_size_does_not_change_the_completions(store: ArtifactStore, size: int) -> None:
    whole = Engine().generate(Path("policy"), REQUESTS, DECODING, lambda done, total: None)
    sampled = run(store, Engine(), size)
    assert sampled.completions == whole
    assert bool(sampled.chunks) == (size < 12)  # a single chunk is not stored separately
    assert sampled.found == 0
    assert sampled.seconds["load"] == pytest.approx(0.001 * max(1, len(sampled.chunks)))


def test_an_interrupt_costs_one_chunk(store: ArtifactStore) -> None:
    with pytest.raises(SamplerError, match="the power is off"):
        run(store, Engine(fails=2))
    again = Engine()
    sampled = run(store, again)
    assert again.calls == [["prompt 2", "prompt 3"]]
    assert sampled.found == 6
    assert sampled.completions == Engine().generate(Path("policy"), REQUESTS, DECODING, lambda *_: None)
    assert sampled.seconds["load"] == pytest.approx(0.002)  # includes the first attempt


@pytest.mark.parametrize(
    "changed",
    [
        {"policy_hash": "abd"},
        {"decoding": Decoding(temperature=0.5, max_new_tokens=4)},
        {"requests": [Request("another", (1, 2, 3)), *REQUESTS[1:]]},
        {"requests": [Request("prompt 0", (0, 1, 9)), *REQUESTS[1:]]},
        {"version": "2"},
    ],
)
def test_chunks_of_different_requests_are_not_reused(store: ArtifactStore, changed: dict[str, Any]) -> None:
    run(store, Engine())
    other = Engine(version=changed.get("version", "1"))
    run(store, other, **changed)
    assert other.calls[0][0] == changed.get("requests", REQUESTS)[0].prompt


def test_chunks_are_removed_once_the_artifact_is_published_and_others_are_reported(
    store: ArtifactStore,
) -> None:
    run(store, Engine(), policy_hash="never finished")
    kept: list[str] = []
    whole = store.make(
        "whole", "k", lambda draft: draft.record(chunks=run(store, Engine()).chunks), inputs={}, settings={}
    )
    kept += whole.manifest["facts"]["chunks"]
    assert len(kept) == 2 and all(store.find(CHUNK, key) for key in kept)
    discard(store, whole)
    discard(store, whole)  # again, after a crash between the two
    assert not any(store.find(CHUNK, key) for key in kept)

    message = left_over(store)
    assert message is not None and message.startswith(
        "2 chunks of sampling runs that are in progress, or were interrupted"
    )
    assert f" {store.root}/artifacts/{CHUNK} (" in message
    store.storage.remove(f"artifacts/{CHUNK}")  # as the message says
    assert left_over(store) is None and whole.manifest == store.find("whole", "k").manifest  # type: ignore[union-attr]
