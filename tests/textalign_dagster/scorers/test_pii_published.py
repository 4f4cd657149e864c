"""Matches against those of the recognisers behind the published scores; and names, with a real pipeline.

`published_pii.jsonl` has the matches of scrubadub 2.0.1 (its default detectors, DateOfBirthDetector and SkypeDetector)
and, for addresses, of pyap 0.3.1, without names. Where ours differ, the row describes the difference.
"""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
import spacy
from spacy.training import Example

from resources.rewards.scoring import ScoringError, inspect_scorer, score_samples
from textalign_dagster.scorers import PIIScorer
from textalign_dagster.scorers.base import Span, merge_spans
from textalign_dagster.settings import SettingsError

ROWS = [json.loads(line) for line in (Path(__file__).parent / "published_pii.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["text"][:30])
def test_matches_are_the_published_ones_except_where_noted(row: dict) -> None:
    published = merge_spans(Span(start, end, kind) for kind, start, end in row["published"])
    own = PIIScorer().spans(row["text"])
    same = [span[:2] for span in own] == [span[:2] for span in published]
    assert same is ("differs" not in row), (own, published)


def test_most_texts_have_the_published_score() -> None:
    """53 of 60 do, as documented."""
    texts = [row["text"] for row in ROWS]
    published = [
        len(merge_spans(Span(start, end, kind) for kind, start, end in row["published"])) / len(row["text"])
        for row in ROWS
    ]
    same = [own == other for own, other in zip(PIIScorer().score(texts), published, strict=True)]
    assert (len(same), sum(same)) == (60, 53)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained pipeline, in place of a downloaded one."""
    nlp = spacy.blank("en")
    nlp.add_pipe("ner")
    sentences = [
        ("Ada Lovelace wrote to Acme yesterday", [(0, 12, "PERSON"), (22, 26, "ORG")]),
        ("Yesterday Acme paid Ada Lovelace", [(10, 14, "ORG"), (20, 32, "PERSON")]),
        ("The weather in Paris is fine", [(15, 20, "GPE")]),
    ]
    examples = [Example.from_dict(nlp.make_doc(text), {"entities": entities}) for text, entities in sentences]
    spacy.util.fix_random_seed(0)
    optimizer = nlp.initialize(lambda: examples)
    for _ in range(40):
        nlp.update(examples, sgd=optimizer)
    folder = tmp_path_factory.mktemp("spacy") / "names"
    nlp.to_disk(folder)
    return folder


TEXT = "Ada Lovelace wrote to Acme yesterday, from ada@acme.com"


def test_names_count_if_a_pipeline_is_given(pipeline: Path) -> None:
    scorer = PIIScorer(names=str(pipeline))
    assert [(span.kind, TEXT[span.start : span.end]) for span in scorer.spans(TEXT)] == [
        ("name", "Ada Lovelace"), ("name", "Acme"), ("email", "ada@acme.com"),
    ]  # fmt: skip
    assert scorer.score([TEXT, "The weather in Paris is fine", ""]) == [3 / len(TEXT), 0.0, None]
    assert PIIScorer().score([TEXT]) == [1 / len(TEXT)]


def test_the_scorer_version_depends_on_the_pipeline(pipeline: Path, tmp_path: Path) -> None:
    scorer = PIIScorer(names=str(pipeline))
    assert scorer.version != PIIScorer().version
    other = spacy.load(pipeline)
    other.meta["description"] = "another one"
    other.to_disk(tmp_path / "names")
    assert PIIScorer(names=str(tmp_path / "names")).version != scorer.version
    samples = pl.DataFrame({"sample_id": ["a"], "prompt": ["p"], "reference": [None], "text": [TEXT]})
    assert score_samples(scorer, samples, lambda *_: None)["score"].to_list() == [3 / len(TEXT)]
    assert inspect_scorer(scorer).startswith("scorer: pii (2+phonenumbers")


def test_unusable_pipelines_are_rejected(tmp_path: Path) -> None:
    spacy.blank("en").to_disk(tmp_path / "blank")
    for names, message in (
        ("en_core_web_none", r"scorer\.names: en_core_web_none is not a spaCy pipeline .*spacy download"),
        (str(tmp_path / "gone"), "is not a spaCy pipeline"),
        (str(tmp_path / "blank"), r"recognises no entities \(components: \[\]\)"),
    ):
        with pytest.raises(SettingsError, match=message):
            inspect_scorer(PIIScorer(names=names))
    samples = pl.DataFrame({"sample_id": ["a"], "prompt": ["p"], "reference": [None], "text": [TEXT]})
    with pytest.raises(ScoringError, match="scorer pii: names: en_core_web_none is not a spaCy pipeline"):
        score_samples(PIIScorer(names="en_core_web_none"), samples, lambda *_: None)
