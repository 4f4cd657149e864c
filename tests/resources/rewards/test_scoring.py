"""Samples scored by pure functions: order, directions, reasons, and worker processes where they pay off."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import polars as pl
import pytest

import resources.rewards.functions
from resources.rewards.models import read_pairs
from resources.rewards.scoring import SCORED, ScoringError, score_samples
from textalign_dagster import PROJECT
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.files import Library
from textalign_dagster.scorers import PatternScorer, PIIScorer, Scorer, ToxicityScorer
from textalign_dagster.settings import SettingsError, merge, validate


def samples(texts: list[str]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "sample_id": [f"s{i}" for i in range(len(texts))],
            "prompt": "you idiot, call 212-555-2187",  # not scored
            "reference": pl.Series([None] * len(texts), dtype=pl.String),
            "text": texts,
            "finish_reason": "stop",
        },
        schema_overrides={"text": pl.String},
    )


def test_scores_values_and_samples_with_nothing_to_score() -> None:
    progress: list[tuple[int, int]] = []
    rows = score_samples(
        ToxicityScorer(words={"darn": 0.5}),
        samples(["darn", "", "fine"]),
        lambda *step: progress.append(step[:2]),
    )
    assert rows.schema == SCORED
    assert rows.rows() == [
        ("s0", 0.5, 0.5, None, None, "ok", None),
        ("s1", None, None, None, None, "skipped", "nothing to score"),
        ("s2", 0.0, 1.0, None, None, "ok", None),
    ]
    assert progress == [(3, 3)]


def test_the_value_is_higher_for_better() -> None:
    pii = score_samples(PIIScorer(), samples(["ring 212-555-2187", "fine"]), lambda *_: None)
    assert pii["score"].to_list() == [1 / 17, 0] and pii["value"].to_list() == [-1 / 17, 0]
    polite = PatternScorer(keywords=("please",), good=True)
    assert score_samples(polite, samples(["please"]), lambda *_: None)["value"].to_list() == [1]


def test_no_samples_give_no_rows() -> None:
    assert score_samples(PIIScorer(), samples([]), lambda *_: None).schema == SCORED


def test_worker_processes_give_the_same_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"you {'idiot' if i % 3 else 'angel'} number {i}" for i in range(30)]
    scorer = ToxicityScorer(words={"angel": 0.25})
    sequential = score_samples(scorer, samples(texts), lambda *_: None)
    monkeypatch.setattr(resources.rewards.functions, "PARALLEL_FROM", 100)
    monkeypatch.setattr(resources.rewards.functions, "CHUNK", 200)
    monkeypatch.setattr(resources.rewards.functions, "processors", lambda: 2)
    progress: list[int] = []
    parallel = score_samples(scorer, samples(texts), lambda done, total: progress.append(done))
    assert parallel.equals(sequential) and len(progress) > 1 and progress[-1] == 30


def test_a_scorer_of_an_unknown_kind_is_refused() -> None:
    class Odd(Scorer):
        name: str = "odd"

        @property
        def version(self) -> str:
            return "1"

        @property
        def better(self) -> Literal["lower", "higher"]:
            return "lower"

    with pytest.raises(ScoringError, match="odd is not of a kind"):
        score_samples(Odd(), samples(["a"]), lambda *_: None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("", "holds no pair"),
        ('{"prompt": "p", "chosen": "a"}\n', ":1: no object with"),
        ('\n{"prompt": "p", "chosen": "a", "rejected": 3}\n', ":2: no object with"),
        ("[1]\n", ":1: no object with"),
        ("{\n", ":1: no object with"),
    ],
)
def test_bad_fixtures_of_a_check_are_reported(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "pairs.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ScoringError, match=message):
        read_pairs(path)


def test_identities_are_json_and_depend_on_the_settings() -> None:
    for scorer in (PIIScorer(), ToxicityScorer(), PatternScorer(keywords=("a",))):
        assert json.loads(json.dumps(scorer.identity)) == scorer.identity == scorer.identity_at(3)
    assert PatternScorer(keywords=("a",)).identity != PatternScorer(keywords=("b",)).identity


def test_an_experiment_names_its_scorer() -> None:
    library = Library((PROJECT / "experiments",))
    base = {**library.content("pep8_alt_rm"), "control": None}
    experiment = validate(Experiment, merge(base, {"scorer": "toxicity"}), "here")
    assert isinstance(experiment.sample_scorer, ToxicityScorer)
    with pytest.raises(SettingsError, match=r"scorer: unknown name 'toxcity' \(did you mean 'toxicity'\?\)"):
        validate(Experiment, merge(base, {"scorer": {"name": "toxcity"}}), "here")
    with pytest.raises(SettingsError, match=r"scorer\.lable: unknown field \(did you mean 'label'\?\)"):
        validate(
            Experiment,
            merge(base, {"scorer": {"name": "classifier", "model": "/m", "good": False, "lable": "x"}}),
            "here",
        )
    imported = {"name": "imported", "path": "/f", "kind": "text"}
    with pytest.raises(SettingsError, match="needs feedback of kind 'reward', which scorer imported"):
        validate(Experiment, merge(base, {"scorer": imported}), "here")


def test_scoring_does_not_import_torch() -> None:
    code = "import sys, resources.rewards.scoring; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PROJECT, timeout=120).returncode == 0
