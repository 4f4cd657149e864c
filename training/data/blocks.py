"""A corpus as blocks of equal length: documents are concatenated, each after an end token, or after whatever the
tokenizer starts a text with.

A policy trained on them expects the same start before a prompt: its tokenizer is saved so that it adds it
(`start_with_end`). Blocks span documents, and tokens attend to all earlier tokens of their block. Every token is
learned, including control tokens, and has the score of its segment (Korbak et al. 2023). The last block is shorter;
only a last block of a single token is dropped, which nothing predicts.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, cast

import polars as pl

from textalign_dagster.pool.conditioning import around_prompt
from textalign_dagster.tokenisation import encode_texts, leading_ids
from training.data.examples import Example
from training.job import Job, JobError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def blocks(rows: pl.DataFrame, tokenizer: PreTrainedTokenizerBase, job: Job) -> list[Example]:
    """The documents, in order, as blocks of ``training.block`` tokens.

    A document's segments (``spans``, if the objective reads them) are tokenised separately, and the job's
    special tokens in its text are control tokens.

    Raises:
        JobError: documents have different weights, or the tokenizer has no end token.
    """
    length = job.training.block
    assert length is not None, "checked by the caller"
    if tokenizer.eos_token_id is None:
        raise JobError(f"{job.policy}: the tokenizer has no eos_token, which separates documents; set one")
    if rows["weight"].n_unique() > 1:
        raise JobError(
            f"{job.rows}: weight: differs between documents, but a block has only one; choose a method that weights tokens "
            "(awr), or remove datapool.weights"
        )
    control = {token: int(cast(int, tokenizer.convert_tokens_to_ids(token))) for token in job.special_tokens}
    start = leading_ids(tokenizer) or [tokenizer.eos_token_id]
    ids, scores = list[int](), list[float]()
    parts = list(_parts(rows, job, control))
    encoded = iter(
        encode_texts(tokenizer, [text for text, _ in parts if text is not None and text not in control])
    )
    for text, score in parts:
        tokens = start if text is None else [control[text]] if text in control else next(encoded)
        ids += tokens
        scores += [score] * len(tokens)
    scored = "token scores" in job.training.objective.needs
    return [
        Example(
            [],
            ids[at : at + length],
            1.0,
            scores=scores[at : at + length] if scored else None,
            sample_id=f"block {at}",
        )
        for at in range(0, len(ids), length)
        if len(ids) - at > 1  # nothing predicts the first token of a block
    ]


def start_with_end(tokenizer: PreTrainedTokenizerBase) -> None:
    """Makes a tokenizer that adds no start token start texts with its end token, like the documents of a block.

    Raises:
        JobError: the tokenizer cannot do that.
    """
    if leading_ids(tokenizer):
        return
    from tokenizers.processors import Sequence as Processors
    from tokenizers.processors import TemplateProcessing

    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise JobError(
            f"{tokenizer.name_or_path}: a tokenizer without a tokenizer.json cannot start texts with its end "
            "token; save it as a fast one"
        )
    end = str(tokenizer.eos_token)
    start = TemplateProcessing(
        single=[end, "$A"],
        pair=[end, "$A", "$B"],
        special_tokens=[(end, int(cast(int, tokenizer.eos_token_id)))],
    )
    before = [backend.post_processor] if backend.post_processor is not None else []
    backend.post_processor = Processors([*before, start])


def _parts(rows: pl.DataFrame, job: Job, control: Collection[str]) -> Iterator[tuple[str | None, float]]:
    """The parts to encode separately, with their scores: for each document its end token (None), then its segments;
    control tokens are separate parts."""
    columns = ["text", "condition", "spans"] if "spans" in rows.columns else ["text", "condition"]
    pattern = "|".join(map(re.escape, control))
    for row in rows.select(columns).iter_rows(named=True):
        before = (
            "".join(around_prompt(job.template, row["condition"]))
            if row["condition"] and job.template
            else ""
        )
        spans = sorted(row.get("spans") or [], key=itemgetter("start"))
        places = [(s["start"], s["end"], s["score"]) for s in spans]
        yield None, places[0][2] if places and places[0][0] == 0 else 0.0
        for text, score in ((before, 0.0), *_pieces(row["text"], places)):
            for part in re.split(f"({pattern})", text) if control else [text]:
                if part:
                    yield part, score


def _pieces(text: str, places: Sequence[tuple[int, int, float]]) -> Iterator[tuple[str, float]]:
    """The segments with their scores, and the text between them with score 0."""
    at = 0
    for start, end, score in places:
        if start > at:
            yield text[at:start], 0.0
        yield text[max(at, start) : end], score
        at = max(at, end)
    yield text[at:], 0.0
