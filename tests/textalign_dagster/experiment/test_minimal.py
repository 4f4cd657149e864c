"""A minimal experiment file, with only task, policy and method, is valid."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from click.testing import CliRunner

from textalign_dagster.cli.main import main
from textalign_dagster.cli.preflight import preflight
from textalign_dagster.experiment.files import Library
from textalign_dagster.loop.stages import stage_settings
from textalign_dagster.methods import METHODS
from textalign_dagster.prompts import Prompts, draw_prompts
from textalign_dagster.settings import SettingsError, write_yaml

REQUIRED = {"alt_lmu": {"ask_for": "no issues"}}
"""Settings without a sensible default."""


def minimal(folder: Path, **changes: object) -> Library:
    content = {"task": "pep8", "policy": {"model": "pep8-sloppy-1m"}, "method": "quark", **changes}
    (folder / "mine.yaml").write_text(write_yaml(content))
    return Library((folder,))


@pytest.mark.parametrize("method", METHODS)
def test_minimal_file_of_every_method(tmp_path: Path, home: Path, method: str) -> None:
    changes: dict[str, object] = {"method": {"name": method, **REQUIRED.get(method, {})}}
    report = preflight(minimal(tmp_path, **changes), "mine")
    assert "prompts: 393, of which 393 per iteration" in report
    assert any(line.startswith("lengths: ") for line in report)


def test_unset_fields_have_the_same_stage_settings_as_explicit_values(tmp_path: Path) -> None:
    unset = minimal(tmp_path).load("mine")
    named = minimal(tmp_path, training={"max_length": 1024}, prompts={"per_iteration": 2048}).load("mine")
    for stage in ("prompt_draws", "checkpoint"):
        assert stage_settings(unset, stage, 1) == stage_settings(named, stage, 1)
    assert unset.training.max_length is None


def test_unset_per_iteration_draws_all_prompts() -> None:
    prompts = pl.DataFrame({"prompt": [f"p{i}" for i in range(7)]}).with_columns(
        reference=pl.lit(None, dtype=pl.String), source=pl.lit("s"), source_revision=pl.lit("1")
    )
    for draw in ("without_replacement", "with_replacement"):
        assert draw_prompts(prompts, Prompts(draw=draw), seed=0, iteration=1).height == 7
    with pytest.raises(SettingsError, match="8 prompts requested"):
        draw_prompts(prompts, Prompts(per_iteration=8), seed=0, iteration=1)


def test_validate_lists_all_problems(tmp_path: Path, home: Path) -> None:
    minimal(
        tmp_path,
        prompts={"path": "nowhere.csv"},
        training={"max_length": 400, "mixed_precision": "fp16"},
    )
    result = CliRunner().invoke(main, ["validate", str(tmp_path / "mine.yaml")])
    lines = result.output.splitlines()
    assert result.exit_code == 1
    assert all(f"{tmp_path / 'mine.yaml'}: " in line for line in lines)
    for field in ("nowhere.csv: no such prompt file", "training.max_length", "mixed_precision"):
        assert sum(field in line for line in lines) == 1, (field, lines)


def test_forecast_without_prompts_from_the_hub(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    small = tmp_path / "small.yaml"
    small.write_text("extends: tldr_alt_lmu\nprompts: {per_iteration: 64}\n")
    result = CliRunner().invoke(main, ["forecast", str(small), "--json"])
    assert result.exit_code == 0, result.output
    forecast = json.loads(result.output)
    # 64 prompts and 20 samples of each, one call per sample.
    assert forecast["calls"] == 64 * 20 and forecast["samples_exist"] is False
    assert (
        "the prompts cannot be read here" in forecast["assumption"] and "400 tokens" in forecast["assumption"]
    )
    # A missing file that was named explicitly is still an error.
    wrong = tmp_path / "tldr.yaml"
    wrong.write_text("extends: tldr_alt_lmu\nprompts: {path: nowhere.csv}\n")
    result = CliRunner().invoke(main, ["forecast", str(wrong)])
    assert result.exit_code == 1 and "nowhere.csv: no such prompt file" in result.output
