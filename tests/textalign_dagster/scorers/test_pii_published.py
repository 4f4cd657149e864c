"""What is found in a text, against the recognisers of the published scores; and names, with a real pipeline.

`published_pii.jsonl` has what scrubadub 2.0.1 finds (its default detectors, DateOfBirthDetector and SkypeDetector),
and pyap 0.3.1 for addresses, without names. Where the two differ, the row says how.
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
def test_the_same_parts_are_found_except_where_it_is_said(row: dict) -> None:
    published = merge_spans(Span(start, end, kind) for kind, start, end in row["published"])
    own = PIIScorer().spans(row["text"])
    same = [span[:2] for span in own] == [span[:2] for span in published]
    assert same is ("differs" not in row), (own, published)


def test_most_texts_have_the_published_score() -> None:
    """Eight of sixty have another number of parts; the documentation says so."""
    texts = [row["text"] for row in ROWS]
    published = [
        len(merge_spans(Span(start, end, kind) for kind, start, end in row["published"])) / len(row["text"])
        for row in ROWS
    ]
    same = [own == one for own, one in zip(PIIScorer().score(texts), published, strict=True)]
    assert (len(same), sum(same)) == (60, 53)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline that was trained, a minute's worth less, as those that one downloads are."""
    nlp = spacy.blank("en")
    nlp.add_pipe("ner")
    told = [
        ("Ada Lovelace wrote to Acme yesterday", [(0, 12, "PERSON"), (22, 26, "ORG")]),
        ("Yesterday Acme paid Ada Lovelace", [(10, 14, "ORG"), (20, 32, "PERSON")]),
        ("The weather in Paris is fine", [(15, 20, "GPE")]),
    ]
    examples = [Example.from_dict(nlp.make_doc(text), {"entities": entities}) for text, entities in told]
    spacy.util.fix_random_seed(0)
    optimizer = nlp.initialize(lambda: examples)
    for _ in range(40):
        nlp.update(examples, sgd=optimizer)
    folder = tmp_path_factory.mktemp("spacy") / "names"
    nlp.to_disk(folder)
    return folder


TEXT = "Ada Lovelace wrote to Acme yesterday, from ada@acme.com"


def test_names_count_where_a_pipeline_is_given(pipeline: Path) -> None:
    scorer = PIIScorer(names=str(pipeline))
    assert [(span.kind, TEXT[span.start : span.end]) for span in scorer.spans(TEXT)] == [
        ("name", "Ada Lovelace"), ("name", "Acme"), ("email", "ada@acme.com"),
    ]  # fmt: skip
    assert scorer.score([TEXT, "The weather in Paris is fine", ""]) == [3 / len(TEXT), 0.0, None]
    assert PIIScorer().score([TEXT]) == [1 / len(TEXT)]


def test_scores_go_with_the_pipeline_that_gave_them(pipeline: Path, tmp_path: Path) -> None:
    scorer = PIIScorer(names=str(pipeline))
    assert scorer.version != PIIScorer().version
    other = spacy.load(pipeline)
    other.meta["description"] = "another one"
    other.to_disk(tmp_path / "names")
    assert PIIScorer(names=str(tmp_path / "names")).version != scorer.version
    samples = pl.DataFrame({"sample_id": ["a"], "prompt": ["p"], "reference": [None], "text": [TEXT]})
    assert score_samples(scorer, samples, lambda *_: None)["score"].to_list() == [3 / len(TEXT)]
    assert inspect_scorer(scorer).startswith("scorer: pii (2+phonenumbers")


def test_a_pipeline_that_cannot_be_used(tmp_path: Path) -> None:
    spacy.blank("en").to_disk(tmp_path / "blank")
    for names, told in (
        ("en_core_web_none", r"scorer\.names: en_core_web_none is not a spaCy pipeline .*spacy download"),
        (str(tmp_path / "gone"), "is not a spaCy pipeline"),
        (str(tmp_path / "blank"), r"recognises no entities \(components: \[\]\)"),
    ):
        with pytest.raises(SettingsError, match=told):
            inspect_scorer(PIIScorer(names=names))
    samples = pl.DataFrame({"sample_id": ["a"], "prompt": ["p"], "reference": [None], "text": [TEXT]})
    with pytest.raises(ScoringError, match="scorer pii: names: en_core_web_none is not a spaCy pipeline"):
        score_samples(PIIScorer(names="en_core_web_none"), samples, lambda *_: None)
