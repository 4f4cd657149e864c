"""The registry of asks: from a judge's settings and samples to its questions."""

from __future__ import annotations

import polars as pl

from textalign_dagster.judging.asking import Asking, samples_of
from textalign_dagster.judging.catalogue import template_of
from textalign_dagster.judging.pair_asks import Ranking, Win
from textalign_dagster.judging.single_asks import Singles
from textalign_dagster.settings.judge import Judge


def asking(judge: Judge, frame: pl.DataFrame) -> Asking:
    """The judge's questions about samples.

    Args:
        frame: sample_id, prompt_id, prompt, reference, text; one row per sample.

    Raises:
        SettingsError: the judge's template cannot be used.
    """
    template, samples = template_of(judge), samples_of(frame)
    if judge.ask == "ranking":
        return Ranking(template, judge.model, samples, judge.pairs)
    if judge.ask == "win":
        return Win(template, judge.model, samples)
    return Singles(template, judge.model, samples, group=judge.group, repeats=judge.repeats)
