"""Combines several replies to one question into one verdict."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean, mode

from textalign_dagster.judging.pairs import WORST_FIRST
from textalign_dagster.judging.verdict import Verdict


def combined(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict from the usable ones: values are averaged, labels decided by vote.

    In a tie, the label given first wins. Text cannot be averaged: text and analysis are those of the
    first verdict with the winning label (without labels, of the first). If none is usable, the worst
    is returned.

    Args:
        verdicts: of one sample, in the order of the repeats; at least one.
    """
    usable = [v for v in verdicts if v.status == "ok"]
    if not usable:
        return min(verdicts, key=lambda v: WORST_FIRST.index(v.status))
    label = mode(v.label for v in usable)  # the first of the most frequent
    chosen = next(v for v in usable if v.label == label)
    values = [v.value for v in usable if v.value is not None]
    value = fmean(values) if values else None
    return Verdict("ok", value=value, label=label, text=chosen.text, analysis=chosen.analysis)
