"""Judging samples one by one: feedback text, categories, judgments, ratings.

Several responses to one prompt can share a call (`group`), and every question can be asked several
times (`repeats`); either way each sample gets its own verdict.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from textalign_dagster.judging.asking import (
    NO_REFERENCE,
    Answer,
    Judged,
    Question,
    Sample,
    shows_reference,
)
from textalign_dagster.judging.parsing import parse, parse_group
from textalign_dagster.judging.rendering import Call, Item, group_call, single_call
from textalign_dagster.judging.repeats import combined
from textalign_dagster.judging.rows import feedback_rows, repeat_rows
from textalign_dagster.judging.template import Template
from textalign_dagster.judging.verdict import Verdict, skipped


class Singles:
    """The questions of an ask that judges responses one by one. See `asking.Asking`.

    Args:
        judge: the judge's snapshot name.
        group: responses to one prompt in one call; 1: the plain form, one item per call.
        repeats: how often each question is asked.
    """

    def __init__(
        self, template: Template, judge: str, samples: Sequence[Sample], *, group: int = 1, repeats: int = 1
    ) -> None:
        self._template, self._judge, self._samples, self._repeats = template, judge, samples, repeats
        self._grouped = group > 1
        needs = shows_reference(template)
        self._groups = _groups([s for s in samples if s.reference is not None or not needs], group)
        self.questions = [
            Question(call, repeat)
            for call in map(self._call, self._groups)  # one rendering serves all repeats
            for repeat in range(repeats)
        ]

    def judged(self, answers: Sequence[Answer]) -> Judged:
        """The verdict of each sample; a group with an unusable reply affects only its own samples."""
        verdicts: defaultdict[str, list[Verdict]] = defaultdict(list)
        keys: defaultdict[str, list[str]] = defaultdict(list)
        asked = [group for group in self._groups for _ in range(self._repeats)]
        for group, answer in zip(asked, answers, strict=True):
            for sample, verdict in zip(group, self._read(answer, len(group)), strict=True):
                verdicts[sample.sample_id].append(verdict)
                keys[sample.sample_id].append(answer.call_key)
        ids = [sample.sample_id for sample in self._samples]
        found = [combined(verdicts[i]) if i in verdicts else skipped(NO_REFERENCE) for i in ids]
        rows = feedback_rows(self._template, self._judge, ids, found, [keys[i] for i in ids])
        if self._repeats == 1:
            return Judged(rows)
        return Judged(rows, repeats=repeat_rows(self._template, verdicts, keys))

    def _call(self, group: Sequence[Sample]) -> Call:
        items = [Item(s.prompt, s.text, s.reference) for s in group]
        return group_call(self._template, items) if self._grouped else single_call(self._template, items[0])

    def _read(self, answer: Answer, count: int) -> list[Verdict]:
        if self._grouped:
            return parse_group(self._template, answer.reply, count)
        return [parse(self._template, answer.reply)]


def _groups(samples: Sequence[Sample], size: int) -> list[list[Sample]]:
    """Samples in groups of at most ``size``, in order; all in a group share prompt and reference."""
    if size == 1:
        return [[sample] for sample in samples]
    alike: defaultdict[tuple[str, str | None], list[Sample]] = defaultdict(list)
    for sample in samples:
        alike[sample.prompt, sample.reference].append(sample)
    return [same[i : i + size] for same in alike.values() for i in range(0, len(same), size)]
