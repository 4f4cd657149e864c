"""Scoring samples with a pure function, a model in a worker process, or a file of judgements.

    rows = score_samples(PIIScorer(), samples, report)

A sample that cannot be scored has a status and a reason, never a number.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl

from resources.rewards.files import from_file
from resources.rewards.functions import by_function
from resources.rewards.models import by_model, read_pairs, worker_settings
from resources.rewards.rows import SCORED, Report, ScoringError
from resources.workers.host import check_host
from textalign_dagster.scorers import ImportedScorer, ModelScorer, Scorer
from textalign_dagster.scorers.base import TextScorer
from textalign_dagster.settings import SettingsError

__all__ = ["SCORED", "ScoringError", "inspect_scorer", "score_samples"]


def score_samples(
    scorer: Scorer,
    samples: pl.DataFrame,
    report: Report,
    *,
    iteration: int | None = None,
    facts: dict[str, Any] | None = None,
) -> pl.DataFrame:
    """The scores of samples, one row each, in their order.

    Args:
        samples: sample_id, prompt (without a condition), reference, text, finish_reason.
        report: called with (done, total).
        iteration: of the samples; scorers that read one file per iteration require it.
        facts: receives what is worth recording, e.g. the accuracy measured in a model's check.

    Returns:
        Rows of :data:`SCORED`.

    Raises:
        ScoringError: a model or file is missing, cannot be used, or fails its check.
    """
    collected: dict[str, Any] = {} if facts is None else facts
    if samples.is_empty():
        return pl.DataFrame(schema=SCORED)
    if isinstance(scorer, TextScorer):
        try:
            return by_function(scorer, samples, report)
        except SettingsError as error:
            raise ScoringError(f"scorer {scorer.name}: {error}") from None
    if isinstance(scorer, ModelScorer):
        return by_model(scorer, samples, report, collected)
    if isinstance(scorer, ImportedScorer):
        return from_file(scorer, samples, iteration, collected)
    raise ScoringError(f"scorer {scorer.name} is not of a kind that can be run here")


def inspect_scorer(scorer: Scorer, field: str = "scorer") -> str:
    """What is known of a scorer before it runs, in one line; for ``textalign validate``.

    A hub model is fetched. A file of judgements may be missing: people write it after sampling.

    Raises:
        SettingsError: its model, the pairs that check it, or the cluster it is to run on is not available.
    """
    found = f"{field}: {scorer.name} ({scorer.version})"
    if isinstance(scorer, ImportedScorer):
        return f"{found}, from {scorer.path}"
    if isinstance(scorer, TextScorer):
        try:
            scorer.check_usable()
        except SettingsError as error:
            raise SettingsError(f"{field}.{error}") from None
    if not isinstance(scorer, ModelScorer) or scorer.trained is not None:
        return found
    try:
        settings = worker_settings(scorer)
        pairs = 0 if scorer.check is None else len(read_pairs(Path(scorer.check.path)))
    except ScoringError as error:
        raise SettingsError(f"{field}: {error}") from None
    read = [Path(settings[name]) for name in ("folder", "weights_folder") if settings[name]]
    check_host(scorer.launcher, scorer.slurm, scorer.k8s, field, read)
    checked = f", checked on {pairs} pairs" if pairs else ", not checked before it is trusted"
    return f"{found}, {settings['weights_folder'] or settings['folder']}{checked}"
