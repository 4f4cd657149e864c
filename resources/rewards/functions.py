"""Scorers that are functions of a text, run here, or in worker processes if there is much to score."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor

import polars as pl

from resources.rewards.rows import Report, scored_rows
from resources.workers.channel import processors
from textalign_dagster.scorers.base import TextScorer

PARALLEL_FROM = 20_000_000
"""Characters from which worker processes pay off: they start in 2 to 5 s, and one processor takes 6 s (toxicity in code) to
39 s (PII in prose that is full of numbers) for that many; counting patterns takes 1 s and hardly gains."""

CHUNK = 1_000_000
"""Characters passed to a worker process at a time."""


def by_function(scorer: TextScorer, samples: pl.DataFrame, report: Report) -> pl.DataFrame:
    texts = samples["text"].to_list()
    scores: list[float | None] = []
    for part in _function_scores(scorer, texts):
        scores += part
        report(len(scores), len(texts))
    return scored_rows(scorer, samples, [(score, None, "skipped") for score in scores], "nothing to score")


def _function_scores(scorer: TextScorer, texts: Sequence[str]) -> Iterator[list[float | None]]:
    chunks = list(_chunks(texts))
    workers = min(processors(), len(chunks))
    if sum(map(len, texts)) < PARALLEL_FROM or workers < 2:
        yield from (scorer.score(chunk) for chunk in chunks)
        return
    # spawn: a fork would copy the locks of Dagster's threads.
    spawn = multiprocessing.get_context("spawn")
    settings = json.dumps(scorer.model_dump(mode="json"))
    with ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        yield from pool.map(_score_chunk, [type(scorer)] * len(chunks), [settings] * len(chunks), chunks)


def _score_chunk(kind: type[TextScorer], settings: str, texts: Sequence[str]) -> list[float | None]:
    return kind.model_validate_json(settings).score(texts)


def _chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
