"""The examples in docs/scorers.md load as settings, and the page names every scorer."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from textalign_dagster import PROJECT
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.files import Library
from textalign_dagster.scorers import AnyScorer, ClassifierScorer, ImportedScorer, RewardModelScorer
from textalign_dagster.settings import merge, parse_yaml, validate

PAGE = (PROJECT / "docs" / "scorers.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```yaml\n(.*?)```", PAGE, re.S)


def loaded(example: str) -> Experiment:
    base = {**Library((PROJECT / "experiments",)).content("pep8_alt_rm"), "control": None}
    base["datapool"] = {**base.get("datapool", {}), "shares": None}
    shown = parse_yaml(example, "docs/scorers.md")
    if isinstance(shown.get("method"), str):
        base |= {"method": {"name": shown.pop("method")}, "training": {}}
    experiment: Experiment = validate(Experiment, merge(base, shown), "here")
    return experiment


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_loads(example: str) -> None:
    experiment = loaded(example)
    assert experiment.scorer is not None and experiment.sample_scorer is experiment.scorer


def test_the_page_shows_each_scorer() -> None:
    kinds = get_args(get_args(AnyScorer)[0])
    names = {kind.model_fields["name"].default for kind in kinds}
    assert names == set(re.findall(r"^\| `(\w+)` \|", PAGE, re.M))
    shown = {type(loaded(example).scorer) for example in EXAMPLES}
    assert shown == set(kinds)


def test_the_examples_behave_as_documented() -> None:
    by_type = {type(scorer): scorer for scorer in (loaded(example).scorer for example in EXAMPLES)}
    assert isinstance(toxic := by_type[ClassifierScorer], ClassifierScorer) and toxic.value(
        0.9
    ) == pytest.approx(0.1)
    assert isinstance(tldr := by_type[RewardModelScorer], RewardModelScorer)
    assert (tldr.shown_cue, tldr.shown_template) == (
        "TL;DR:", "<|startoftext|>{prompt}\nTL;DR: {text}<|endoftext|>")  # fmt: skip
    assert by_type[ImportedScorer].kinds == ("text",)  # type: ignore[union-attr]
