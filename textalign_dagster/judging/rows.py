"""Verdicts as rows of the tables FEEDBACK and FEEDBACK_REPEATS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import polars as pl

from textalign_dagster.judging.parsing import PARSER_VERSION
from textalign_dagster.judging.template import Template
from textalign_dagster.judging.verdict import Verdict
from textalign_dagster.tables import FEEDBACK, FEEDBACK_REPEATS


def aspect_of(template: Template) -> str:
    """The column ``aspect``: what is judged."""
    return template.aspect or template.name


def provenance_of(template: Template, judge: str) -> dict[str, str]:
    """The columns aspect, scorer, scorer_version and parser_version: which judge used which template for what.

    Args:
        judge: the judge's snapshot name, e.g. ``gpt-4o-2024-08-06``.
    """
    return {
        "aspect": aspect_of(template),
        "scorer": f"{judge} / {template.name}",
        "scorer_version": template.label_version,
        "parser_version": PARSER_VERSION,
    }


def feedback_rows(
    template: Template,
    judge: str,
    sample_ids: Sequence[str],
    verdicts: Sequence[Verdict],
    call_keys: Sequence[Sequence[str]],
) -> pl.DataFrame:
    """Rows of FEEDBACK, one per sample; for every ask except the pairwise ones (see `pairs`).

    Args:
        call_keys: keys of the ledger rows behind each verdict (in a group: the same one for all).
    """
    provenance = provenance_of(template, judge)
    rows = [
        {
            "sample_id": sample_id,
            "kind": template.kind,
            "value": verdict.value,
            "label": verdict.label,
            "text": verdict.text,
            "status": verdict.status,
            "reason": verdict.reason,
            "call_keys": list(keys),
            **provenance,
        }
        for sample_id, verdict, keys in zip(sample_ids, verdicts, call_keys, strict=True)
    ]
    return pl.DataFrame(rows, FEEDBACK)


def repeat_rows(
    template: Template, verdicts: Mapping[str, Sequence[Verdict]], call_keys: Mapping[str, Sequence[str]]
) -> pl.DataFrame:
    """Rows of FEEDBACK_REPEATS, in the order of the samples.

    Args:
        verdicts, call_keys: by sample, in the order of the repeats.
    """
    rows = [
        (sample_id, aspect_of(template), repeat, verdict.value, verdict.label, verdict.status, key)
        for sample_id, given in verdicts.items()
        for repeat, (verdict, key) in enumerate(zip(given, call_keys[sample_id], strict=True))
    ]
    return pl.DataFrame(rows, FEEDBACK_REPEATS, orient="row")
