"""Judging by comparison: samples with each other (`ranking`), or with their reference (`win`).

Every comparison is asked in both orders. Identical texts tie without a call.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import polars as pl

from textalign_dagster.ids import content_hash
from textalign_dagster.judging.asking import (
    NO_REFERENCE,
    Answer,
    Judged,
    Question,
    Sample,
    in_order,
    shows_reference,
)
from textalign_dagster.judging.pair_draw import COLUMNS, sample_pairs
from textalign_dagster.judging.pairs import (
    PairVerdict,
    pair_frame,
    pair_verdict,
    ranking_feedback,
    win_feedback,
)
from textalign_dagster.judging.parsing import parse
from textalign_dagster.judging.rendering import pair_calls
from textalign_dagster.judging.rows import provenance_of
from textalign_dagster.judging.template import Template

ALONE = "its prompt has no other sample to compare it with"
UNDRAWN = "it is in none of the pairs drawn for its prompt (judge.pairs)"


class Pair(NamedTuple):
    """Two texts to be compared."""

    prompt_id: str
    id_a: str
    id_b: str
    prompt: str
    text_a: str
    text_b: str
    reference: str | None = None  # shown with them, if the template shows it


class _Comparisons:
    """The questions about pairs, two each, and their answers as rows of PAIRS."""

    def __init__(self, template: Template, judge: str, pairs: Sequence[Pair]) -> None:
        self._template, self._pairs = template, pairs
        self.provenance = provenance_of(template, judge)
        self.questions = [question for pair in pairs for question in self._both_orders(pair)]

    def frame(self, answers: Sequence[Answer]) -> pl.DataFrame:
        """Rows of PAIRS, in the order of the pairs."""
        verdicts, keys = [], []
        remaining = iter(answers)
        for pair in self._pairs:
            asked = [] if pair.text_a == pair.text_b else [next(remaining), next(remaining)]
            read = [parse(self._template, answer.reply) for answer in asked]
            verdicts.append(pair_verdict(*read) if read else PairVerdict("ok", "tie"))
            keys.append([answer.call_key for answer in asked])
        assert next(remaining, None) is None, "one answer per question"
        ids = pl.DataFrame(
            [pair[:3] for pair in self._pairs], dict.fromkeys(COLUMNS, pl.String), orient="row"
        )
        return pair_frame(ids, verdicts, keys, self.provenance)

    def _both_orders(self, pair: Pair) -> Iterator[Question]:
        if pair.text_a == pair.text_b:
            return
        first, second = pair_calls(self._template, pair.prompt, pair.text_a, pair.text_b, pair.reference)
        yield Question(first, order_shown=f"{pair.id_a}, {pair.id_b}")
        yield Question(second, order_shown=f"{pair.id_b}, {pair.id_a}")


class Ranking:
    """Compares samples of a prompt with each other. See `asking.Asking`.

    Args:
        judge: the judge's snapshot name.
        limit: maximum number of pairs per prompt; None: all.
    """

    def __init__(
        self, template: Template, judge: str, samples: Sequence[Sample], limit: int | None = None
    ) -> None:
        self._samples = samples
        needs = shows_reference(template)
        usable = [s for s in samples if s.reference is not None or not needs]
        self._comparisons = _Comparisons(template, judge, _pairs(usable, limit, needs))
        self.questions = self._comparisons.questions
        self._without = {s.sample_id for s in samples} - {s.sample_id for s in usable}

    def judged(self, answers: Sequence[Answer]) -> Judged:
        """Each sample's share of points, and the pairs behind it."""
        pairs = self._comparisons.frame(answers)
        rows = ranking_feedback(pairs, self._left_out(pairs), self._comparisons.provenance)
        return Judged(in_order(rows, self._samples), pairs)

    def _left_out(self, pairs: pl.DataFrame) -> Mapping[str, str]:
        """sample_id → why it is in no pair."""
        compared = {*pairs["sample_a"], *pairs["sample_b"]}
        prompts = set(pairs["prompt_id"])
        return {
            s.sample_id: NO_REFERENCE
            if s.sample_id in self._without
            else (UNDRAWN if s.prompt_id in prompts else ALONE)
            for s in self._samples
            if s.sample_id not in compared
        }


class Win:
    """Compares each sample with its prompt's reference. See `asking.Asking`."""

    def __init__(self, template: Template, judge: str, samples: Sequence[Sample]) -> None:
        self._samples = samples
        self._left_out = {s.sample_id: NO_REFERENCE for s in samples if s.reference is None}
        pairs = [
            Pair(
                s.prompt_id,
                reference_id(s.prompt_id, s.reference),
                s.sample_id,
                s.prompt,
                s.reference,
                s.text,
            )
            for s in samples
            if s.reference is not None
        ]
        self._comparisons = _Comparisons(template, judge, pairs)
        self.questions = self._comparisons.questions

    def judged(self, answers: Sequence[Answer]) -> Judged:
        """Each sample's win, tie or loss, and the same as pairs."""
        pairs = self._comparisons.frame(answers)
        rows = win_feedback(pairs, self._left_out, self._comparisons.provenance)
        return Judged(in_order(rows, self._samples), pairs)


def reference_id(prompt_id: str, reference: str) -> str:
    """The id of a reference where it is compared like a sample."""
    return content_hash("reference", prompt_id, reference)


def _pairs(samples: Sequence[Sample], limit: int | None, same_reference: bool) -> list[Pair]:
    """The pairs to compare. Where the reference is shown, both samples of a pair share it."""
    known = {s.sample_id: s for s in samples}
    frame = pl.DataFrame(
        [
            (s.sample_id, content_hash(s.prompt_id, s.reference) if same_reference else s.prompt_id)
            for s in samples
        ],
        {"sample_id": pl.String, "prompt_id": pl.String},
        orient="row",
    )
    found = []
    for _, id_a, id_b in sample_pairs(frame, limit).iter_rows():
        a, b = known[id_a], known[id_b]
        shown = a.reference if same_reference else None
        found.append(Pair(a.prompt_id, id_a, id_b, a.prompt, a.text, b.text, shown))
    return found
