"""The asset checks: what must hold for each table, with figures and examples.

Every function is pure: table and limits in, verdict out. A failed check of severity ERROR stops
the iteration before the next stage; WARN is only shown.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from typing import Any

import dagster as dg
import polars as pl

from textalign_dagster.experiment.evaluation import DISTINCT_BLOCK
from textalign_dagster.loop.partitions import GRID
from textalign_dagster.measures.correlation import pearson
from textalign_dagster.pool.conditioning import render, rendered_once
from textalign_dagster.tables import STATUSES

CHECKS: Mapping[str, Mapping[str, str]] = {
    "prompt_draws": {"schema": "Columns, types and a unique key."},
    "generations": {
        "schema": "Columns, types and a unique key.",
        "not_empty": "Few generations are empty.",
        "not_duplicated": "Few generations repeat the text of another one.",
        "conditioned_once": "The condition precedes each prompt exactly once.",
    },
    "feedback": {
        "schema": "Columns, types and a unique key; only `ok` rows carry a value.",
        "usable": "Little feedback is unparseable or failed.",
        "judge_model": "All replies name the requested model.",
        "length_correlation": "The feedback's value does not merely track length.",
    },
    "datapool": {
        "schema": "Columns, types and a unique key.",
        "balance": "Every bucket got about as many rows as requested.",
        "conditioned_once": "The condition precedes each drawn prompt exactly once.",
    },
    "evaluation": {
        "schema": "Columns, types and a unique key.",
        "diversity": "Samples are nearly as diverse as those of iteration 0.",
    },
}
WARNINGS = {"judge_model", "length_correlation", "balance"}
DATED = re.compile(r"[-@:]?(\d{4}-\d{2}-\d{2}|\d{8}|\d{6}|\d{4}|\d{3})")  # after a model's name


def specs(asset: str) -> list[dg.AssetCheckSpec]:
    """The check specs of an asset."""
    with warnings.catch_warnings():
        # Partitioned checks are a preview feature of Dagster 1.13.
        warnings.simplefilter("ignore", dg.PreviewWarning)
        return [
            dg.AssetCheckSpec(
                name,
                asset=asset,
                description=description,
                blocking=name not in WARNINGS,
                partitions_def=GRID,
            )
            for name, description in CHECKS.get(asset, {}).items()
        ]


def _verdict(name: str, passed: bool, description: str, **metadata: Any) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name=name,
        passed=bool(passed),
        severity=dg.AssetCheckSeverity.WARN if name in WARNINGS else dg.AssetCheckSeverity.ERROR,
        description=description,
        metadata={k: v for k, v in metadata.items() if v is not None},
    )


def schema(frame: pl.DataFrame, expected: pl.Schema, key: list[str]) -> dg.AssetCheckResult:
    """Columns and types match the table's schema, and its key is complete and unique."""
    problems: list[str] = []
    for name, kind in expected.items():
        if name not in frame.columns:
            problems.append(f"column {name} is missing")
        elif frame.schema[name] != kind:
            problems.append(f"column {name} holds {frame.schema[name]}, not {kind}")
    problems += [f"unknown column {name}" for name in frame.columns if name not in expected]
    if not problems:
        for name in key:
            # NULL: unconditioned; the experiment's own policy
            nulls = 0 if name in ("condition", "subject") else frame[name].null_count()
            if nulls:
                problems.append(f"{nulls} rows without {name}")
        twice = int(frame.select(pl.struct(key).is_duplicated().sum()).item())
        if twice:
            problems.append(f"{twice} rows share their key ({', '.join(key)})")
    if not problems and "status" in frame.columns:
        unknown = frame.filter(~pl.col("status").is_in(STATUSES).fill_null(False)).height
        valued = frame.filter((pl.col("status") != "ok") & pl.col("value").is_not_null()).height
        if unknown:
            problems.append(f"{unknown} rows of unknown status")
        if valued:
            problems.append(f"{valued} rows that are not ok carry a value")
    return _verdict("schema", not problems, "; ".join(problems) or f"{frame.height:,} rows")


def not_empty(generations: pl.DataFrame, limit: float) -> dg.AssetCheckResult:
    """The share of generations without any text."""
    empty = generations.filter(pl.col("text").str.strip_chars() == "")
    share = empty.height / max(generations.height, 1)
    return _verdict(
        "not_empty",
        generations.height > 0 and share <= limit,
        f"{share:.1%} of generations are empty (limit {limit:.0%})",
        share=share,
        examples=_list(empty["sample_id"]),
    )


def not_duplicated(generations: pl.DataFrame, limit: float) -> dg.AssetCheckResult:
    """The share of generations that repeat the text of another sample of the same prompt."""
    repeats = generations.filter(~pl.struct("prompt_id", "text").is_first_distinct())
    share = repeats.height / max(generations.height, 1)
    return _verdict(
        "not_duplicated",
        share <= limit,
        f"{share:.1%} of generations repeat another one of the same prompt (limit {limit:.0%})",
        share=share,
        examples=_list(repeats["text"]),
    )


def conditioned_once(template: str, conditions: pl.Series, prompts: pl.Series) -> dg.AssetCheckResult:
    """Prompts do not already contain the condition that is prepended to them."""
    pairs = pl.DataFrame({"condition": conditions, "prompt": prompts}).unique()
    bad = [
        prompt
        for condition, prompt in pairs.iter_rows()
        if condition is not None
        and not rendered_once(render(template, condition, prompt), template, condition, prompt)
    ]
    return _verdict(
        "conditioned_once",
        not bad,
        f"{len(bad):,} of {pairs.height:,} prompts would contain their condition twice"
        if bad
        else f"{pairs.height:,} distinct inputs",
        examples=_list(pl.Series(bad, dtype=pl.String)),
    )


def usable(feedback: pl.DataFrame, limit: float, remedy: str = "") -> dg.AssetCheckResult:
    """The share of feedback that is unparseable or failed, with reasons and examples.

    Args:
        remedy: added to the message if rows failed.
    """
    bad = feedback.filter(pl.col("status").is_in(["unparseable", "failed"]))
    share = bad.height / max(feedback.height, 1)
    reasons = bad.group_by("status", "reason").len().sort("len", descending=True).head(5)
    message = "; ".join(f"{n}× {status}: {reason}" for status, reason, n in reasons.iter_rows())
    return _verdict(
        "usable",
        share <= limit,
        f"{share:.1%} of feedback is unusable (limit {limit:.0%})"
        + (f": {message}" if message else "")
        + (f"; {remedy}" if remedy and share > limit and "failed" in bad["status"] else ""),
        share=share,
        examples=_list(bad["sample_id"]),
    )


def judge_model(requested: str | None, named: Mapping[str, int]) -> dg.AssetCheckResult:
    """The replies name a single model, the one requested (or a dated form of it).

    Args:
        requested: the judge's model; None without a judge.
        named: model → number of replies; replies that name none are not in it.
    """
    listed = ", ".join(f"{name} ({n:,} replies)" for name, n in sorted(named.items()))
    others = [name for name in named if requested is not None and not is_dated_form(name, requested)]
    passed = not others and len(named) <= 1
    if requested is None or not named:
        message = "no reply names a model" if requested is not None else "no judge"
    elif passed:
        message = listed
    elif others:
        message = (
            f"{requested} was requested, but replies name {listed}: set judge.model to the model you want"
        )
    else:
        message = f"replies name {len(named)} models, {listed}: set judge.model to a dated one"
    return _verdict("judge_model", passed, message)


def is_dated_form(name: str, requested: str) -> bool:
    """Whether a model's name is the one requested, with or without a snapshot's date or number.

    An organisation before the name ("openai/…") may be missing from either.
    """
    if "/" not in name or "/" not in requested:
        name, requested = name.rpartition("/")[2], requested.rpartition("/")[2]
    return name.startswith(requested) and DATED.fullmatch(name[len(requested) :] or "-000") is not None


def length_correlation(values: pl.Series, lengths: pl.Series, limit: float) -> dg.AssetCheckResult:
    """Pearson's correlation of the feedback's value with length in tokens or characters."""
    r = pearson(values.to_numpy(), lengths.to_numpy()) if len(values) else None
    if r is None:
        return _verdict("length_correlation", True, "undefined: values or lengths do not vary")
    return _verdict(
        "length_correlation",
        abs(r) <= limit,
        f"correlation of value and length is {r:+.2f} (limit ±{limit:.2f})",
        correlation=r,
    )


def balance(shortfalls: pl.DataFrame, limit: float) -> dg.AssetCheckResult:
    """The missing share of the worst-filled bucket. ``shortfalls``: label, wanted, obtained, short, …"""
    with_quota = shortfalls.filter(pl.col("wanted") > 0)
    if with_quota.is_empty():
        return _verdict("balance", True, "no bucket has a quota")
    worst = (
        with_quota.with_columns(share=pl.col("short") / pl.col("wanted")).sort("share").row(-1, named=True)
    )
    return _verdict(
        "balance",
        worst["share"] <= limit,
        f"bucket {worst['label']!r} lacks {worst['short']:,} of {worst['wanted']:,} rows "
        f"({worst['share']:.0%}, limit {limit:.0%})",
        share=worst["share"],
    )


def diversity(now: float | None, at_start: float | None, limit: float) -> dg.AssetCheckResult:
    """Distinct-3 of an evaluation relative to that of iteration 0.

    If iteration 0 has none, there is nothing to compare with: a warning that does not block.
    """
    if not at_start:
        return dg.AssetCheckResult(
            check_name="diversity",
            passed=False,
            severity=dg.AssetCheckSeverity.WARN,
            description=f"cannot be computed: distinct-3 is counted over {DISTINCT_BLOCK} samples with words, and "
            "iteration 0 has fewer; raise evaluation.prompts",
        )
    if now is None:
        return _verdict("diversity", False, "no words were generated")
    ratio = now / at_start
    return _verdict(
        "diversity",
        ratio >= limit,
        f"distinct-3 is {ratio:.0%} of iteration 0's ({now:.3f} against {at_start:.3f}; limit {limit:.0%})",
        ratio=ratio,
    )


def _list(values: pl.Series, show: int = 5) -> dg.MetadataValue | None:
    return dg.MetadataValue.json(values.head(show).to_list()) if len(values) else None
