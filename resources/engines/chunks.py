"""Sampling that survives a crash: completions are stored chunk by chunk until the whole is published.

A chunk is a separate artifact, keyed by everything it depends on: the policy, the decoding, the engine and
its versions, the prompts and their seeds. So the next attempt reuses the chunks that an interrupted one has
finished. No cell points at a chunk; publishing the whole discards its chunks.

Requests carry their own seeds, so a completion does not depend on the chunk it is in, up to rounding: with
other requests in the call the last digits of logits may differ, as they do with the batch size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field

import polars as pl

from resources.engines.sampler import Completion, Decoding, Model, Request, Sampler
from resources.store import ArtifactStore
from resources.store.artifact import Artifact
from resources.store.attempts import Draft
from resources.workers.channel import Progress
from textalign_dagster.ids import content_hash
from textalign_dagster.loop.stages import SAMPLED_CHUNK as CHUNK

VERSION = 1
COMPLETIONS = pl.Schema(
    {"text": pl.String, "n_tokens": pl.Int32, "finish_reason": pl.String, "logprob": pl.Float64}
)
"""A chunk's completions, in the order of its requests and of their seeds."""


@dataclass
class Sampled:
    """Completions by request and seed, and how they were obtained."""

    completions: list[list[Completion]] = field(default_factory=list)
    chunks: list[str] = field(default_factory=list)  # keys, to be recorded as the fact `chunks`
    found: int = 0  # completions reused from an earlier attempt
    seconds: dict[str, float] = field(default_factory=lambda: {"load": 0.0, "generate": 0.0})
    """Until the model was ready, and after that; includes the time earlier attempts spent on reused chunks."""


def sample(
    store: ArtifactStore,
    engine: Sampler,
    model: Model,
    policy_hash: str,
    requests: Sequence[Request],
    decoding: Decoding,
    size: int,
    progress: Progress,
) -> Sampled:
    """The completions of every request, in the order of requests and of their seeds.

    Args:
        size: completions per chunk; if all fit into one, no chunk is stored.

    Raises:
        SamplerError: the engine cannot sample.
        ArtifactError: a chunk cannot be written or read.
    """
    parts, total = list(cut(requests, size)), sum(len(request.seeds) for request in requests)
    sampled, done = Sampled(), 0
    for part in parts:

        def report(now: int, _: int, before: int = done) -> None:
            progress(before + now, total)

        if len(parts) == 1:
            rows, seconds = timed(engine, model, part, decoding, report)
        else:
            artifact = chunk(store, engine, model, policy_hash, part, decoding, report)
            rows, seconds = completions_of(artifact, part), artifact.manifest["facts"]["part_seconds"]
            sampled.chunks.append(artifact.key)
            sampled.found += artifact.reused * sum(map(len, rows))
        sampled.completions += rows
        done += sum(map(len, rows))
        for name, took in seconds.items():
            sampled.seconds[name] += took
    return sampled


def cut(requests: Sequence[Request], size: int) -> Iterator[list[Request]]:
    """Runs of consecutive requests with at most ``size`` completions in total; a request is never split."""
    part: list[Request] = []
    filled = 0
    for request in requests:
        if part and filled + len(request.seeds) > size:
            yield part
            part, filled = [], 0
        part.append(request)
        filled += len(request.seeds)
    if part:
        yield part


def chunk(
    store: ArtifactStore,
    engine: Sampler,
    model: Model,
    policy_hash: str,
    requests: Sequence[Request],
    decoding: Decoding,
    progress: Progress,
) -> Artifact:
    """The chunk of these requests, with a table `completions`; sampled unless it is stored already."""

    def produce(draft: Draft) -> None:
        rows, seconds = timed(engine, model, requests, decoding, progress)
        flat = [asdict(one) for row in rows for one in row]
        draft.write("completions", pl.DataFrame(flat, COMPLETIONS), COMPLETIONS)
        draft.record(part_seconds=seconds)

    settings = {
        "decoding": decoding.identity,
        "engine": engine.engine,
        "engine_version": engine.engine_version,
        "requests": content_hash("requests", [[request.prompt, list(request.seeds)] for request in requests]),
    }
    inputs = {"policy": policy_hash}
    key = content_hash(CHUNK, VERSION, settings, inputs)
    return store.make(CHUNK, key, produce, inputs=inputs, settings=settings)


def completions_of(artifact: Artifact, requests: Sequence[Request]) -> list[list[Completion]]:
    """The completions of a chunk, by request and seed."""
    every = (Completion(**row) for row in artifact.frame("completions").iter_rows(named=True))
    return [[next(every) for _ in request.seeds] for request in requests]


def timed(
    engine: Sampler, model: Model, requests: Sequence[Request], decoding: Decoding, progress: Progress
) -> tuple[list[list[Completion]], dict[str, float]]:
    """The engine's completions, and the seconds until its model was ready (load) and after (generate)."""
    started, before = time.monotonic(), engine.load_seconds
    rows = engine.generate(model, requests, decoding, progress)
    load = engine.load_seconds - before
    return rows, {"load": load, "generate": time.monotonic() - started - load}


def discard(store: ArtifactStore, whole: Artifact) -> None:
    """Removes the chunks that a published artifact was assembled from, as recorded in it."""
    for key in whole.manifest["facts"].get("chunks", ()):
        store.remove(CHUNK, key)


def left_over(store: ArtifactStore) -> str | None:
    """A sentence about the chunks in the store; None: there are none."""
    files = store.storage.entries(f"artifacts/{CHUNK}")
    count = sum(path.endswith("/manifest.json") for path in files)
    if not count:
        return None
    mib = sum(size for size, _ in files.values()) / 2**20
    return (
        f"{count} chunks of sampling runs that are in progress, or were interrupted and never resumed, are in "
        f"{store.storage.place(f'artifacts/{CHUNK}')} ({mib:.1f} MiB); `textalign clean --apply` removes them"
    )
