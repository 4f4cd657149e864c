"""From rows to examples: which tokens a row is, and which of them are learned.

Prompt and text are tokenized separately and concatenated, as at sampling time, where the policy
continues the tokens of the prompt: a pair of characters at the boundary is never merged into one
token that could not have been sampled. (The price: re-encoding a decoded text need not give the
very tokens that were sampled.) Labels are on the text and its end token only.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import polars as pl

from textalign_dagster.pool.conditioning import around_prompt
from textalign_dagster.tokenisation import encode_texts, leading_ids
from training.job import Job, JobError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("sample_id", "prompt", "condition", "text", "finish_reason", "n_tokens", "weight")


@dataclass(frozen=True)
class Example:
    """One row as token ids; ``reference`` is its prompt as the KL reference reads it."""

    prompt: list[int]
    text: list[int]
    weight: float
    reference: list[int] | None = None

    @property
    def length(self) -> int:
        return len(self.prompt) + len(self.text)


def read_rows(path: Path, template: str | None) -> pl.DataFrame:
    """The rows to train on; rows of weight 0 are left out.

    Raises:
        JobError: unreadable, empty, a missing column, a NULL, or a value that means nothing.
    """
    try:
        frame = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise JobError(f"{path}: cannot be read as Parquet ({error}); write it again") from None
    missing = [name for name in COLUMNS if name not in frame.columns]
    if missing:
        raise JobError(f"{path}: missing columns {missing}; rows need {list(COLUMNS)}")
    if frame.is_empty():
        raise JobError(f"{path}: no rows to train on; the datapool drew none")
    for name in ("sample_id", "prompt", "text", "finish_reason", "weight"):
        _refuse(frame, pl.col(name).is_null(), path, name, "is NULL; leave such rows out of the draw")
    weight = pl.col("weight").cast(pl.Float64)
    _refuse(frame, ~weight.is_finite() | (weight < 0), path, "weight", "is negative or not a number")
    _refuse(
        frame,
        ~pl.col("finish_reason").is_in(["stop", "length"]),
        path,
        "finish_reason",
        "is neither 'stop' nor 'length'",
    )
    if template is None:
        _refuse(
            frame,
            pl.col("condition").is_not_null(),
            path,
            "condition",
            "is given, but the job has no template to render it with",
        )
    used = frame.filter(weight > 0)
    if used.is_empty():
        raise JobError(f"{path}: weight: 0 in all {frame.height} rows; nothing to train on")
    return used


def _refuse(frame: pl.DataFrame, bad: pl.Expr, path: Path, column: str, what: str) -> None:
    rows = frame.filter(bad)
    if not rows.is_empty():
        first = rows["sample_id"][0]
        raise JobError(
            f"{path}: {column}: {what} (in {rows.height} of {frame.height} rows, first in sample {first})"
        )


def ends(
    text: str,
    n_tokens: int,
    finish_reason: str,
    rule: Literal["finish_reason", "legacy"],
    max_new_tokens: int | None,
) -> bool:
    """Whether the end token follows the text: a sample that was cut off must not teach stopping.

    ``finish_reason``: it follows samples that stopped by themselves. ``legacy`` is the published rule
    (ALT's released code): none iff the text does not end in ``.``, ``?`` or ``!`` and has exactly
    ``max_new_tokens`` tokens (counted by re-encoding the text).
    """
    if rule == "finish_reason":
        return finish_reason == "stop"
    return text.rstrip().endswith((".", "?", "!")) or n_tokens != max_new_tokens


def encode(rows: pl.DataFrame, tokenizer: PreTrainedTokenizerBase, job: Job) -> list[Example]:
    """The rows as token ids, in their order; rows whose text has no token at all are left out.

    A row longer than ``max_length`` loses the *beginning of its prompt*: condition, the cue at the
    prompt's end, and the text are kept whole.

    Raises:
        JobError: condition and text alone are longer than ``max_length``, naming the sample.
    """
    settings = job.training
    texts = encode_texts(tokenizer, rows["text"].to_list())
    wants_reference = settings.objective.kl_coef > 0 and not settings.objective.kl_reference_sees_condition
    prompts = _Prompts(tokenizer, job.template, rows["prompt"].to_list(), rows["condition"].to_list())
    unconditioned = (
        _Prompts(tokenizer, None, rows["prompt"].to_list(), [None] * rows.height) if wants_reference else None
    )
    examples = []
    columns = zip(rows["sample_id"], rows["text"], rows["finish_reason"], rows["weight"], texts, strict=True)
    for i, (sample, text, finish_reason, weight, ids) in enumerate(columns):
        if ends(text, len(ids), finish_reason, settings.eos_rule, job.max_new_tokens):
            if tokenizer.eos_token_id is None:
                raise JobError(
                    f"{job.policy}: the tokenizer has no eos_token, so stopping cannot be taught; set one"
                )
            ids = [*ids, tokenizer.eos_token_id]
        if not ids:
            continue
        room = settings.max_length - len(ids)
        prompt = prompts.cut(i, room)
        if prompt == []:
            raise JobError(
                f"{job.rows}: sample {sample}: the prompt is empty, and the tokenizer starts texts "
                "with nothing either; give it a prompt"
            )
        if prompt is None:
            raise JobError(
                f"{job.rows}: sample {sample}: the text has {len(ids)} tokens, which with its condition "
                f"is more than training.max_length ({settings.max_length}); raise max_length or "
                "lower max_new_tokens"
            )
        reference = unconditioned.cut(i, room) if unconditioned else None
        examples.append(Example(prompt, list(ids), float(weight), reference))
    if not examples:
        raise JobError(f"{job.rows}: text: empty in all {rows.height} rows; nothing to train on")
    return examples


class _Prompts:
    """Rendered prompts as tokens, and where in them the unconditioned prompt lies."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str | None,
        prompts: list[str],
        conditions: list[str | None],
    ):
        around = [
            ("", "") if c is None or template is None else around_prompt(template, c) for c in conditions
        ]
        rendered = [start + prompt + end for (start, end), prompt in zip(around, prompts, strict=True)]
        # Slow tokenizers have no offsets; every tokenizer saved as tokenizer.json has.
        encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        self._ids, self._offsets = encoded["input_ids"], encoded["offset_mapping"]
        self._spans = [
            (len(start), len(start) + len(prompt)) for (start, _), prompt in zip(around, prompts, strict=True)
        ]
        self._start = leading_ids(tokenizer)

    def cut(self, i: int, room: int) -> list[int] | None:
        """The tokens of prompt i, at most ``room``; None if even its condition does not fit.

        At least one token remains: the first token of the text must have something to follow.
        """
        ids, start = self._ids[i], self._start
        if ids[: len(start)] == start:
            start = []  # a chat template writes the beginning itself: not twice
        excess = len(start) + len(ids) - room
        if excess <= 0:
            return [*start, *ids]
        first, last = self._spans[i]
        inside = [t for t, (a, b) in enumerate(self._offsets[i]) if a >= first and b <= last and b > a]
        if excess > len(inside) or len(start) + len(ids) - excess < 1:
            return None
        dropped = set(inside[:excess])
        return [*start, *(token for t, token in enumerate(ids) if t not in dropped)]
