"""Every check, with a table that passes and tables that fail."""

from __future__ import annotations

import dagster as dg
import polars as pl
import pytest

from textalign_dagster.loop import checks
from textalign_dagster.tables import FEEDBACK

ERROR, WARN = dg.AssetCheckSeverity.ERROR, dg.AssetCheckSeverity.WARN


def feedback(**columns: list[object]) -> pl.DataFrame:
    """Two judged samples, with columns replaced."""
    rows: dict[str, list[object]] = {
        "sample_id": ["a", "b"],
        "aspect": ["style", "style"],
        "kind": ["text", "text"],
        "value": [1.0, 2.0],
        "label": [None, None],
        "text": ["bad", "good"],
        "status": ["ok", "ok"],
        "reason": [None, None],
        "scorer": ["lint", "lint"],
        "scorer_version": ["1", "1"],
        "parser_version": [None, None],
        "call_keys": [[], []],
    }
    return pl.DataFrame(rows | columns, schema=FEEDBACK)


def schema(frame: pl.DataFrame) -> dg.AssetCheckResult:
    return checks.schema(frame, FEEDBACK, ["sample_id", "aspect"])


def test_schema_passes() -> None:
    result = schema(feedback())
    assert result.passed and result.severity == ERROR and result.description == "2 rows"


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (feedback().drop("value"), "column value is missing"),
        (
            feedback().with_columns(pl.col("value").cast(pl.Float32)),
            "column value holds Float32, not Float64",
        ),
        (feedback().with_columns(more=pl.lit(1)), "unknown column more"),
        (feedback(sample_id=["a", "a"]), "2 rows share their key (sample_id, aspect)"),
        (feedback(sample_id=["a", None]), "1 rows without sample_id"),
        (feedback(aspect=["style", None]), "1 rows without aspect"),
        (feedback(status=["ok", "fine"]), "1 rows of unknown status"),
        (feedback(status=["ok", None], value=[1.0, None]), "1 rows of unknown status"),
        (feedback(status=["ok", "failed"]), "1 rows that are not ok carry a value"),
    ],
)
def test_schema_fails(frame: pl.DataFrame, message: str) -> None:
    result = schema(frame)
    assert not result.passed and result.severity == ERROR
    assert message in str(result.description)


def test_schema_of_repeats_on_different_aspects_passes() -> None:
    assert schema(feedback(sample_id=["a", "a"], aspect=["style", "speed"])).passed


def generated(*texts: str) -> pl.DataFrame:
    return pl.DataFrame({"sample_id": [str(i) for i in range(len(texts))], "prompt_id": "p", "text": texts})


def test_not_empty() -> None:
    passed = checks.not_empty(generated("x", "y", "z", " \n"), limit=0.25)
    assert passed.passed and passed.metadata["share"].value == 0.25
    failed = checks.not_empty(generated("x", "", "z", " \n"), limit=0.25)
    assert not failed.passed and failed.severity == ERROR
    assert failed.metadata["examples"].value == ["1", "3"]


def test_no_generations_at_all_is_a_failure() -> None:
    empty = generated("x").clear()
    assert not checks.not_empty(empty, limit=1.0).passed
    assert checks.not_duplicated(empty, limit=0.0).passed  # left to the other check


def test_not_duplicated() -> None:
    rows = generated("x", "x", "x", "y")
    failed = checks.not_duplicated(rows, limit=0.4)
    assert not failed.passed and failed.metadata["share"].value == 0.5
    assert failed.metadata["examples"].value == ["x", "x"]
    assert checks.not_duplicated(rows, limit=0.5).passed
    other_prompts = rows.with_columns(prompt_id=pl.Series(list("pqrs")))
    assert checks.not_duplicated(other_prompts, limit=0.0).passed  # `pass` can answer many prompts


def test_conditioned_once() -> None:
    template = "# {condition}\n{prompt}"
    fine = checks.conditioned_once(template, pl.Series(["good", None]), pl.Series(["def f():", "def f():"]))
    assert fine.passed and fine.description == "2 distinct inputs"
    twice = checks.conditioned_once(template, pl.Series(["good"]), pl.Series(["# good\ndef f():"]))
    assert not twice.passed and twice.severity == ERROR
    assert twice.metadata["examples"].value == ["# good\ndef f():"]


def test_usable() -> None:
    status = ["ok", "skipped", "unparseable", "failed"]
    rows = pl.DataFrame(
        {"sample_id": list("abcd"), "status": status, "reason": [None, None, "no JSON", "timeout"]}
    )
    failed = checks.usable(rows, limit=0.4)
    assert not failed.passed and failed.severity == ERROR
    assert failed.metadata["share"].value == 0.5 and failed.metadata["examples"].value == ["c", "d"]
    assert "1× unparseable: no JSON" in str(failed.description)
    assert "1× failed: timeout" in str(failed.description)
    assert checks.usable(rows, limit=0.5).passed
    assert checks.usable(rows.filter(pl.col("status") == "skipped"), limit=0.0).passed  # no judge was called


def test_usable_suggests_the_remedy_only_where_it_helps() -> None:
    rows = pl.DataFrame({"sample_id": ["a"], "status": ["failed"], "reason": ["timeout"]})
    assert str(checks.usable(rows, 0.0, "send it again").description).endswith("; send it again")
    assert "send" not in str(checks.usable(rows, 1.0, "send it again").description)
    garbled = rows.with_columns(status=pl.lit("unparseable"))
    assert "send" not in str(checks.usable(garbled, 0.0, "send it again").description)


@pytest.mark.parametrize(
    ("requested", "named", "passed"),
    [
        ("judge-1", {"judge-1": 9}, True),
        ("judge-1", {}, True),
        (None, {}, True),
        ("gpt-4o-mini", {"gpt-4o-mini-2024-07-18": 9}, True),
        ("gpt-4o", {"gpt-4o-mini-2024-07-18": 9}, False),
        ("claude-3-opus", {"claude-3-opus@20240229": 9}, True),
        ("openai/gpt-4o", {"gpt-4o-2024-08-06": 1}, True),
        ("Qwen/Qwen2.5-7B", {"Other/Qwen2.5-7B": 1}, False),
        ("judge-1", {"judge-2-mini": 9}, False),
        ("judge-1", {"judge-1-mini": 9}, False),
        ("gpt-4o-mini-2024-07-18", {"gpt-4o-mini": 9}, False),
        ("gpt-4", {"gpt-4-0613": 5, "gpt-4-0314": 4}, False),
    ],
)
def test_judge_model(requested: str | None, named: dict[str, int], passed: bool) -> None:
    result = checks.judge_model(requested, named)
    assert (result.passed, result.severity) == (passed, WARN)
    assert all(name in str(result.description) for name in named)


@pytest.mark.parametrize(("lengths", "passed"), [([1, 2, 3, 4], False), ([2, 1, 1, 2], True)])
def test_length_correlation(lengths: list[int], passed: bool) -> None:
    result = checks.length_correlation(pl.Series([1.0, 2.0, 3.0, 4.0]), pl.Series(lengths), limit=0.5)
    assert result.passed is passed and result.severity == WARN


@pytest.mark.parametrize("values", [[], [1.0, 1.0]])
def test_undefined_length_correlation_does_not_warn(values: list[float]) -> None:
    lengths = pl.Series([1, 2][: len(values)], dtype=pl.Int64)
    result = checks.length_correlation(pl.Series(values, dtype=pl.Float64), lengths, limit=0.0)
    assert result.passed and "undefined" in str(result.description)


def shortfalls(**columns: list[object]) -> pl.DataFrame:
    return pl.DataFrame({"label": ["good", "bad"], "wanted": [10, 10], "short": [1, 6]} | columns)


def test_balance() -> None:
    failed = checks.balance(shortfalls(), limit=0.5)
    assert not failed.passed and failed.severity == WARN
    assert "bucket 'bad' lacks 6 of 10 rows (60%" in str(failed.description)
    assert checks.balance(shortfalls(), limit=0.6).passed
    assert checks.balance(shortfalls(wanted=[None, None]), limit=0.0).passed
    assert checks.balance(shortfalls(wanted=[10, 0]), limit=0.1).passed  # a bucket without a quota


def test_diversity() -> None:
    assert checks.diversity(0.35, 0.5, limit=0.7).passed
    failed = checks.diversity(0.34, 0.5, limit=0.7)
    assert not failed.passed and failed.severity == ERROR
    assert failed.metadata["ratio"].value == pytest.approx(0.68)
    assert not checks.diversity(0.0, 0.5, limit=0.7).passed
    silent = checks.diversity(None, 0.5, limit=0.7)
    assert not silent.passed and silent.severity == ERROR


@pytest.mark.parametrize("at_start", [None, 0.0])
def test_undefined_diversity_warns(at_start: float | None) -> None:
    result = checks.diversity(0.5, at_start, limit=0.7)
    assert not result.passed and result.severity == WARN
    assert "evaluation.prompts" in str(result.description)


@pytest.mark.parametrize("asset", checks.CHECKS)
def test_specs_block_unless_they_warn(asset: str) -> None:
    for spec in checks.specs(asset):
        assert spec.blocking is (spec.name not in checks.WARNINGS)
        assert spec.description and spec.partitions_def is not None
