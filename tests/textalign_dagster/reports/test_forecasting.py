"""Forecasts of offline experiments: the judge is called on the responses of the file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from resources.store import ArtifactStore
from textalign_dagster.experiment import Experiment
from textalign_dagster.reports.forecasting import forecast_iteration
from textalign_dagster.settings import validate


@pytest.mark.parametrize(("ask", "calls"), [("rating", 5), ("ranking", 2 * (3 + 1))])
def test_calls_of_a_judge_on_the_responses_of_a_file(tmp_path: Path, ask: str, calls: int) -> None:
    rows = [{"prompt": "P", "completion": f"text {i}"} for i in range(3)]
    rows += [{"prompt": "Q", "completion": f"text {i}"} for i in range(2)]
    path = tmp_path / "file.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    content = {
        "task": {"name": "pep8"},
        "method": {"name": "dpo"},
        "policy": {"model": "pep8-sloppy-1m"},
        "offline": {"path": str(path)},
        "judge": {
            "model": "j", "base_url": "http://localhost:1/v1", "api_key_env": None, "template": ask, "ask": ask,
        },
    }  # fmt: skip
    experiment: Experiment = validate(Experiment, content, "here.yaml")
    forecast = forecast_iteration(ArtifactStore(tmp_path / "store"), "mine", experiment, 1)
    assert forecast["calls"] == calls and not forecast["samples_exist"]
