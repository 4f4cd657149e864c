"""From rows to examples: the tokens of a row, and which of them are learned.

Prompt and text are tokenized separately and concatenated, as at sampling time, where the policy
continues the tokens of the prompt: characters across the boundary are never merged into a token
that could not have been sampled. (The price: re-encoding a decoded text does not always give the
tokens that were sampled.) Only the text and its end token have labels.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import polars as pl

from textalign_dagster.pool.conditioning import around_prompt
from textalign_dagster.tokenisation import encode_texts, leading_ids, trailing_ids
from training.job import Job, JobError
from training.objectives.base import ROLES, Need
from training.settings import DEFAULT_LENGTH

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMNS = ("sample_id", "prompt", "condition", "text", "finish_reason", "n_tokens", "weight")
"""Columns that every row has. The other columns of :data:`textalign_dagster.tables.EXAMPLES` can be left out
unless the objective needs them."""
NEEDED: dict[Need, str] = {
    "groups": "group_id",
    "rewards": "reward",
    "sampled log-probs": "sampled_logprob",
    "second context": "second_prompt",
    "mismatched": "second_prompt",
    "token scores": "spans",
}
"""The column that provides what an objective needs."""


@dataclass(frozen=True)
class Example:
    """One row as token ids, and what else the objective reads."""

    prompt: list[int]
    text: list[int]
    weight: float
    reference: list[int] | None = None  # the prompt as the reference reads it
    second: list[int] | None = None  # the prompt of the second context
    role: int = 0  # index into objectives.base.ROLES
    group: int | None = None  # examples with the same number share a micro-batch; None: no group
    reward: float = math.nan
    sampled_log_prob: float = math.nan
    scores: list[float] | None = None  # of each token of the text
    reference_log_probs: list[float] | None = None  # of each token of the text under the reference
    second_reference_log_probs: list[float] | None = None  # the same after the prompt of the second context
    sample_id: str = field(default="", compare=False)

    @property
    def length(self) -> int:
        """Tokens of prompt and text; of both contexts if there are two."""
        return (
            len(self.prompt)
            + len(self.text)
            + (len(self.second) + len(self.text) if self.second is not None else 0)
        )

    @property
    def labels(self) -> int:
        """The number of tokens that are predicted; nothing predicts the first token of a sequence."""
        return len(self.text) - (not self.prompt)


def read_rows(path: Path, template: str | None, needs: Collection[Need] = ()) -> pl.DataFrame:
    """The rows to train on; those of weight 0 are left out.

    Args:
        needs: of the objective; their columns must exist, without NULL (except in ``second_prompt``).

    Raises:
        JobError: the file is unreadable or empty, a column is missing, or a value is NULL or invalid.
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
    required = {need: column for need, column in NEEDED.items() if need in needs}
    for need, column in required.items():
        if column not in frame.columns:
            raise JobError(f"{path}: {column}: missing; the objective needs {need}")
        if need != "second context":  # NULL there: the example has none
            _refuse(frame, pl.col(column).is_null(), path, column, f"is NULL, but the objective needs {need}")
    if "role" in frame.columns:
        _refuse(frame, ~pl.col("role").is_in(list(ROLES)), path, "role", f"is not one of {', '.join(ROLES)}")
    if "groups" in needs:
        _refuse_incomplete_pairs(frame, path)
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


def _refuse_incomplete_pairs(frame: pl.DataFrame, path: Path) -> None:
    """Raises unless every pair is one chosen and one rejected row, of equal weight."""
    pair = (
        frame.filter(pl.col("role").is_in(["chosen", "rejected"]))
        .group_by("group_id", maintain_order=True)
        .agg(
            chosen=(pl.col("role") == "chosen").sum(),
            rejected=(pl.col("role") == "rejected").sum(),
            weights=pl.col("weight").n_unique(),
        )
    )
    bad = pair.filter((pl.col("chosen") != 1) | (pl.col("rejected") != 1) | (pl.col("weights") != 1))
    if not bad.is_empty():
        raise JobError(
            f"{path}: group_id: {bad.height} pairs are not one chosen and one rejected row of equal weight, the "
            f"first is {bad['group_id'][0]}; write both rows of a pair, with the same weight"
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
    (ALT's released code): no end token iff the text does not end in ``.``, ``?`` or ``!`` and has exactly
    ``max_new_tokens`` tokens (counted by re-encoding the text).
    """
    if rule == "finish_reason":
        return finish_reason == "stop"
    return text.rstrip().endswith((".", "?", "!")) or n_tokens != max_new_tokens


def encode(
    rows: pl.DataFrame, tokenizer: PreTrainedTokenizerBase, job: Job, max_length: int | None = None
) -> list[Example]:
    """The rows as token ids, in order; rows whose text has no tokens are left out.

    Args:
        max_length: of a row, in tokens; None: as in the settings.

    A longer row loses the *beginning of its prompt*: condition, the cue at the prompt's end, and
    the text are kept whole.

    Raises:
        JobError: condition and text alone are longer than ``max_length``; names the sample.
    """
    settings = job.training
    longest = max_length or settings.max_length or DEFAULT_LENGTH
    objective = settings.objective
    texts = encode_texts(tokenizer, rows["text"].to_list())
    prompts = _Prompts(tokenizer, job.template, rows["prompt"].to_list(), rows["condition"].to_list())
    bare: list[str | None] = [None] * rows.height
    unconditioned = second = None
    if objective.reference_policy is not None and not objective.reference_sees_condition:
        unconditioned = _Prompts(tokenizer, None, rows["prompt"].to_list(), bare)
    if {"second context", "mismatched"} & objective.needs:
        seconds = rows["second_prompt"].to_list()
        second = _Prompts(tokenizer, None, [prompt or "" for prompt in seconds], bare)
    scores = _token_scores(tokenizer, rows) if "token scores" in objective.needs else None
    groups = _groups(rows) if "groups" in objective.needs else [None] * rows.height
    columns = ("sample_id", "text", "finish_reason", "weight", "role", "reward", "sampled_logprob")
    given = rows.with_columns(
        pl.lit(value, dtype).alias(name) for name, value, dtype in DEFAULTS if name not in rows.columns
    ).select(columns)
    trailing = trailing_ids(tokenizer)
    examples = []
    for i, (row, group, ids) in enumerate(zip(given.iter_rows(named=True), groups, texts, strict=True)):
        stops = ends(row["text"], len(ids), row["finish_reason"], settings.eos_rule, job.max_new_tokens)
        if "score head" in objective.needs:
            ids = [*ids, *trailing]  # as a scorer sees it
        elif stops:
            if tokenizer.eos_token_id is None:
                raise JobError(
                    f"{job.policy}: the tokenizer has no eos_token, so stopping cannot be taught; set one"
                )
            ids = [*ids, tokenizer.eos_token_id]
        if not ids:
            continue
        room = longest - len(ids)
        where = f"{job.rows}: sample {row['sample_id']}"
        examples.append(
            Example(
                _fitting(prompts, i, room, len(ids), where, longest),
                list(ids),
                float(row["weight"]),
                reference=unconditioned.cut(i, room) if unconditioned else None,
                second=_fitting(second, i, room, len(ids), where, longest)
                if second and seconds[i] is not None
                else None,
                role=ROLES.index(row["role"]),
                group=group,
                reward=_number(row["reward"]),
                sampled_log_prob=_number(row["sampled_logprob"]),
                scores=None if scores is None else [*scores[i], *([0.0] if stops else [])],
                sample_id=row["sample_id"],
            )
        )
    if "groups" in objective.needs:
        examples = _whole_groups(examples, groups)
    if not examples:
        raise JobError(f"{job.rows}: text: empty in all {rows.height} rows; nothing to train on")
    return examples


DEFAULTS = (("role", "only", pl.String), ("reward", None, pl.Float64), ("sampled_logprob", None, pl.Float64))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _fitting(prompts: _Prompts, i: int, room: int, taken: int, where: str, max_length: int) -> list[int]:
    """The tokens of prompt i that fit with a text of ``taken`` tokens."""
    prompt = prompts.cut(i, room)
    if prompt == []:
        raise JobError(
            f"{where}: the prompt is empty, and the tokenizer adds no start token either; give it a prompt"
        )
    if prompt is None:
        raise JobError(
            f"{where}: the text has {taken} tokens, which together with its condition exceeds training.max_length "
            f"({max_length}); raise max_length or lower max_new_tokens"
        )
    return prompt


def _groups(rows: pl.DataFrame) -> list[int | None]:
    """A number for each row, the same for rows with the same ``group_id``."""
    return (rows["group_id"].rank("dense") - 1).cast(pl.Int64).to_list()


def _whole_groups(examples: list[Example], groups: Sequence[int | None]) -> list[Example]:
    """The examples of complete groups (none left out for its empty text), group by group."""
    size = Counter(groups)
    members: dict[int | None, list[Example]] = {}
    for example in examples:
        members.setdefault(example.group, []).append(example)
    return [example for group, own in members.items() if len(own) == size[group] for example in own]


def _token_scores(tokenizer: PreTrainedTokenizerBase, rows: pl.DataFrame) -> list[list[float]]:
    """For each text the score of each of its tokens: the highest of the spans that overlap it, else 0."""
    encoded = tokenizer(
        rows["text"].to_list(),
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
    )
    return [
        [
            max((s["score"] for s in spans if s["start"] < end and start < s["end"]), default=0.0)
            for start, end in offsets
        ]
        for offsets, spans in zip(encoded["offset_mapping"], rows["spans"].to_list(), strict=True)
    ]


class _Prompts:
    """Rendered prompts as tokens, and the span of the unconditioned prompt in each."""

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
        # Slow tokenizers have no offsets; every tokenizer saved as tokenizer.json has them.
        encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
        self._ids, self._offsets = encoded["input_ids"], encoded["offset_mapping"]
        self._spans = [
            (len(start), len(start) + len(prompt)) for (start, _), prompt in zip(around, prompts, strict=True)
        ]
        self._start = leading_ids(tokenizer)

    def cut(self, i: int, room: int) -> list[int] | None:
        """The tokens of prompt i, at most ``room``; None if even its condition does not fit.

        At least one token remains: the first token of the text must be predicted from something.
        """
        ids, start = self._ids[i], self._start
        if ids[: len(start)] == start:
            start = []  # a chat template has already added it
        excess = len(start) + len(ids) - room
        if excess <= 0:
            return [*start, *ids]
        first, last = self._spans[i]
        inside = [t for t, (a, b) in enumerate(self._offsets[i]) if a >= first and b <= last and b > a]
        if excess > len(inside) or len(start) + len(ids) - excess < 1:
            return None
        dropped = set(inside[:excess])
        return [*start, *(token for t, token in enumerate(ids) if t not in dropped)]
