"""The lexicon of rude words: which disguises it sees through, what it ignores, and how weights add up."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textalign_dagster.scorers import ToxicityScorer
from textalign_dagster.scorers.toxicity import _lexicon
from textalign_dagster.settings import SettingsError, validate

SCORER = ToxicityScorer()
LISTED = [" ".join(entry.words) for entry in _lexicon()]

FOUND = [
    ("You are an idiot!", "idiot"),
    ("an IDIOT", "IDIOT"),
    ("you 1d10t", "1d10t"),
    ("so stuuuuupid", "stuuuuupid"),
    ("i d i o t", "i d i o t"),
    ("what an i-d-i-o-t.", "i-d-i-o-t"),
    ("oh sh1t", "sh1t"),
    ("oh $h!t", "$h!t"),
    ("**idiot**, he said", "idiot"),
    ("an ïdiot", "ïdiot"),
    ("f*ck", "f*ck"),
    ("f***!", "f***"),
    ("I'll kill you.", "I'll kill you"),
    ("I’ll kill you", "I’ll kill you"),
    ("Just go and KILL   yourself", "KILL   yourself"),
    ("4sshole", "4sshole"),
]


@pytest.mark.parametrize(("text", "part"), FOUND)
def test_rude_words_are_found(text: str, part: str) -> None:
    assert [text[s.start : s.end] for s in SCORER.spans(text)] == [part]
    score = SCORER.score([text])[0]
    assert score is not None and 0 < score < 1


@pytest.mark.parametrize(
    "text",
    [
        "Have a nice day.",
        "as is, a class of assessments in Scunthorpe",
        "page a55 of 455, room 4a",
        "I grew up by a dam and a shitake farm",
        "a b c d e f g",
        "The committee will kill the process and restart you",
        "10 h 30 min, 5 kg",
        "5! = 120 and a*b*c",
    ],
)
def test_harmless_text_scores_zero(text: str) -> None:
    assert SCORER.score([text]) == [0.0]


def test_the_score_by_hand() -> None:
    scorer = ToxicityScorer(words={"darn": 0.5, "heck": 0.2, "darn heck": 0.1, "idiot": 0})
    texts = ["fine", "darn", "darn, darn!", "darn heck", "an idiot", "", " \n?!"]
    expected = [0, 0.5, 0.75, 1 - 0.5 * 0.8 * 0.9, 0, None, None]
    assert scorer.score(texts) == pytest.approx(expected)
    assert scorer.better == "lower" and scorer.value(0.75) == 0.25


def test_every_listed_form_is_found_and_has_a_kind() -> None:
    for entry in _lexicon():
        text = " ".join(entry.words)
        score = SCORER.score([f"well, {text}."])[0]
        assert score is not None and score >= entry.weight - 1e-9, text
        assert entry.kind in ("insult", "profanity", "threat") and 0 < entry.weight < 1


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60), st.sampled_from(LISTED))
def test_adding_a_listed_word_never_lowers_the_score(text: str, word: str) -> None:
    before = SCORER.score([text])[0] or 0.0
    for longer in (f"{text} {word}", f"{word} {text}", f"{text}\n{word}"):
        after = SCORER.score([longer])[0]
        assert after is not None and before <= after <= 1 and after > 0


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(LISTED), st.sampled_from([str.upper, str.title, lambda w: w + "!!"]))
def test_case_and_exclamation_make_no_difference(word: str, change: Any) -> None:
    assert SCORER.score([change(word)]) == SCORER.score([word])


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80))
def test_spans_lie_in_the_text(text: str) -> None:
    spans = SCORER.spans(text)
    assert all(0 <= s.start < s.end <= len(text) for s in spans)
    assert all(one.end <= two.start for one, two in pairwise(spans))
    score = SCORER.score([text])[0]
    assert score is None or (score > 0) == bool(spans)


def test_versions_depend_on_the_words() -> None:
    assert ToxicityScorer().version == SCORER.version
    assert ToxicityScorer(words={"darn": 0.5}).version != SCORER.version
    assert ToxicityScorer(words={"idiot": 0.1}).version != SCORER.version


def test_scoring_time_is_not_quadratic() -> None:
    started = time.process_time()
    size = 50_000
    for part in ("a ", "a", "i d i o ", "kill ", "*", "!", "1", "a.", "ass"):
        SCORER.score([part * (size // len(part))])
    assert time.process_time() - started < 10


@pytest.mark.parametrize(
    ("words", "message"), [({"?!": 0.5}, "contains no letter"), ({"darn": 2.0}, "from 0 to 1")]
)
def test_bad_words_are_refused(words: dict[str, float], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        validate(ToxicityScorer, {"words": words}, "here")
