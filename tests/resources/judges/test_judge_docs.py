"""The examples in docs/judges.md load as valid settings, and their templates resolve."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from textalign_dagster import PROJECT
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.files import Library
from textalign_dagster.judging import template_of
from textalign_dagster.settings import merge, parse_yaml, validate
from textalign_dagster.settings.judge import Ask

PAGE = (PROJECT / "docs" / "judges.md").read_text(encoding="utf-8")
EXAMPLES = [text for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.S) if "judge:" in text]


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_loads(example: str) -> None:
    changes = parse_yaml(example, "docs/judges.md")
    base_name = "pep8_alt_rm" if "method" in changes else "pep8_alt_lmu"  # its datapool fits no other method
    base = {**Library((PROJECT / "experiments",)).content(base_name), "control": None}
    if isinstance(changes.get("method"), str):
        changes["method"] = {"name": changes["method"]}
    experiment: Experiment = validate(Experiment, merge(base, changes), "docs/judges.md")
    judge = experiment.judge or experiment.evaluation.judge
    assert judge is not None
    template_of(judge)


def test_page_documents_every_ask() -> None:
    assert set(get_args(Ask)) == set(re.findall(r"^\| `(\w+)` \| (?!the judge)", PAGE, re.M))
    for setting in ("group", "pairs", "repeats", "scale", "budget_usd", "limits"):
        assert any(re.search(rf"^  {setting}:", example, re.M) for example in EXAMPLES), setting
