"""The settings shown in docs/tasks.md are valid."""

from __future__ import annotations

import re

import pytest

from tests.toy import PROJECT
from textalign_dagster.experiment import Experiment
from textalign_dagster.settings import merge, parse_yaml, validate

PAGE = (PROJECT / "docs" / "tasks.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)


@pytest.mark.parametrize("text", BLOCKS)
def test_every_yaml_block_is_valid_in_an_experiment(text: str) -> None:
    whole = merge(
        {"method": "no_feedback", "policy": {"model": "/nowhere"}}, parse_yaml(text, "docs/tasks.md")
    )
    assert validate(Experiment, whole, "docs/tasks.md")


@pytest.mark.parametrize("name", ["summarization", "toxicity", "instructions", "pii"])
def test_every_measure_is_documented(name: str) -> None:
    content = {"task": name, "method": "no_feedback", "policy": {"model": "/nowhere"}}
    task = validate(Experiment, content, "x").task
    section = PAGE.split(f"\n## {name}\n")[1].split("\n## ")[0]
    for measure in task.measures:
        known = {"score": "score", "words": "words", "cut_off": "cut-off share"}.get(
            measure.name, measure.name
        )
        known = re.sub(r"rouge_(.)", "ROUGE", known)
        spans = re.sub(r"dist_2", "dist_1", known)
        assert known in section or spans in section or known in PAGE.split("\n## ")[0], measure.name
