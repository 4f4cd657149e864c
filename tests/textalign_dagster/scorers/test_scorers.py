"""Scorers: what they match, what they ignore, and how scores are defined."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textalign_dagster.scorers import PatternScorer, PIIScorer
from textalign_dagster.scorers.base import Span, merge_spans
from textalign_dagster.settings import SettingsError, validate

FOUND = [
    ("Write to jane.doe+x@mail.example.co.uk, please.", "email", "jane.doe+x@mail.example.co.uk"),
    ("see https://example.com/a?b=c).", "url", "https://example.com/a?b=c"),
    ("at www.example.org.", "url", "www.example.org"),
    ("call (212) 555-2187 now", "phone", "(212) 555-2187"),
    ("call 212-555-2187.", "phone", "212-555-2187"),
    ("call +1 212 555 2187", "phone", "+1 212 555 2187"),
    ("ring +44 20 7946 0958!", "phone", "+44 20 7946 0958"),
    ("my number is 123-45-6789", "ssn", "123-45-6789"),
    ("card 4111 1111 1111 1111 expires", "credit_card", "4111 1111 1111 1111"),
    ("card 378282246310005", "credit_card", "378282246310005"),
    ("username: jane\npassword: hunter2", "credential", "username: jane\npassword: hunter2"),
    ("ask @jane_doe about it", "twitter", "@jane_doe"),
    ("Skype: jane.doe.77 or call", "skype", "jane.doe.77"),
    ("She was born on May 3, 1975 in Rome", "birth_date", "May 3, 1975"),
    ("DOB: 25/12/1980", "birth_date", "25/12/1980"),
    ("Date of birth\n\n1990-02-28", "birth_date", "1990-02-28"),
    ("Date of birth\n1990-02-28", "birth_date", "1990-02-28"),
    (
        "She lives at 742 Evergreen Terrace, Springfield, OR 97403.",
        "address",
        "742 Evergreen Terrace, Springfield, OR 97403",
    ),
    ("at 10 Main St.", "address", "10 Main St."),
]


@pytest.mark.parametrize(("text", "kind", "part"), FOUND)
def test_personal_information_is_found(text: str, kind: str, part: str) -> None:
    assert [(s.kind, text[s.start : s.end]) for s in PIIScorer().spans(text)] == [(kind, part)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "The year 1999 had 365 days, 12 months and 3.14 pies.",
        "version 1.2.3.4567 of 2024-05-06",
        "a@b is not an address, and neither is me@",
        "x = data[3] @ matrix; @property",
        "card 4111 1111 1111 1112",
        "0000 0000 0000 0000",
        "000-12-3456 and 123-00-4567",
        "The meeting of May 3, 1975 was long.",
        "He was born on February 30, 1980 and in 1850-01-01",
        "12 Monthly coverage Drive",
        "1234567890123",
        "ISBN 978-3-16-148410-0",
        "skype is a program",
        "Date of birth\n\n\n1990-02-28",
        "1990-02-28\n\nis the birthday",
    ],
)
def test_other_text_is_left_alone(text: str) -> None:
    allowed = {"@property"}
    matches = [text[s.start : s.end] for s in PIIScorer().spans(text)]
    assert set(matches) <= allowed, matches


def test_the_three_metrics_by_hand() -> None:
    text = "Mail a@bc.de or x@yz.de now"  # 27 characters, 5 words, 2 found
    assert len(text) == 27
    assert PIIScorer().score([text]) == [2 / 27]
    assert PIIScorer(metric="per_character_twice").score([text]) == [2 / 27 / 27]
    assert PIIScorer(metric="word_share").score([text]) == [40.0]


def test_overlapping_or_touching_spans_are_merged() -> None:
    assert merge_spans([Span(5, 9, "b"), Span(0, 3, "a"), Span(3, 5, "c"), Span(11, 12, "d")]) == [
        Span(0, 9, "a"),
        Span(11, 12, "d"),
    ]
    assert merge_spans([Span(0, 3, "a"), Span(3, 5, "c")], touching=False) == [
        Span(0, 3, "a"),
        Span(3, 5, "c"),
    ]
    assert len(PIIScorer().spans("https://x.example/me@mail.example")) == 1


def test_empty_text_scores_none_and_text_without_matches_zero() -> None:
    for metric in ("per_character", "per_character_twice", "word_share"):
        assert PIIScorer(metric=metric).score(["", "fine"]) == [None, 0.0]  # type: ignore[arg-type]
    assert PIIScorer(metric="word_share").score([" \n"]) == [None]


def test_versions_distinguish_settings() -> None:
    versions = {
        PIIScorer().version,
        PIIScorer(metric="word_share").version,
        PIIScorer(detectors=("email",)).version,
    }
    assert len(versions) == 3 and PIIScorer().version == PIIScorer().version
    assert (PIIScorer().name, PIIScorer().better) == ("pii", "lower")
    reordered = PIIScorer(detectors=("url", "email"))
    assert reordered.version == PIIScorer(detectors=("email", "url")).version


@settings(max_examples=100)
@given(st.text(st.sampled_from("ab1 23-./@:,()+\nM"), max_size=80))
def test_spans_are_sorted_disjoint_and_within_the_text(text: str) -> None:
    scorer = PIIScorer()
    spans = scorer.spans(text)
    assert all(0 <= s.start < s.end <= len(text) for s in spans)
    assert all(one.end < two.start for one, two in pairwise(spans))
    for metric in ("per_character", "word_share"):
        value = PIIScorer(metric=metric).score([text])[0]  # type: ignore[arg-type]
        assert value is None or 0 <= value <= 100


def test_scoring_time_is_not_quadratic() -> None:
    started = time.process_time()
    size = 100_000
    parts = (
        "a",
        "1",
        "1 ",
        "1-",
        "a.",
        "a@",
        "@",
        "A ",
        "1 A ",
        "(",
        "user: ",
        "born 1/",
        "www.",
        "\n",
        "+1 ",
        "http://",
        "May 1 ",
    )
    PIIScorer().score([part * (size // len(part)) for part in parts])
    assert time.process_time() - started < 15


# Patterns


def test_keywords_by_hand() -> None:
    texts = ["Damn this damned thing. DAMN!", "fine", ""]
    assert PatternScorer(keywords=("damn",)).score(texts) == [2, 0, 0]
    assert PatternScorer(keywords=("damn",), whole_words=False).score(texts) == [3, 0, 0]
    assert PatternScorer(keywords=("damn",), ignore_case=False).score(texts) == [0, 0, 0]
    assert PatternScorer(keywords=("damn",), metric="any").score(texts) == [1, 0, 0]
    assert PatternScorer(keywords=("damn",), metric="per_word").score(texts) == [2 / 5, 0, None]
    assert PatternScorer(keywords=("damn",), metric="per_character").score(texts) == [2 / 29, 0, None]


def test_keywords_are_literal_and_patterns_are_not() -> None:
    assert PatternScorer(keywords=("a.c", "(x)")).score(["abc a.c (x) $&"]) == [2]
    scorer = PatternScorer(patterns=(r"\d+", "a."))
    assert scorer.spans("ab 12 ab") == [Span(0, 2, "a."), Span(3, 5, r"\d+"), Span(6, 8, "a.")]
    assert PatternScorer(keywords=("aa",), whole_words=False).score(["aaaa"]) == [2]
    assert PatternScorer(patterns=("abc", "bcd")).score(["abcd"]) == [1]  # overlapping matches are one


def test_pattern_versions_and_direction() -> None:
    one, two = PatternScorer(keywords=("a",)), PatternScorer(keywords=("b",))
    assert one.version != two.version and one.name == "patterns"
    assert PatternScorer(keywords=("please",), good=True).better == "higher"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "keywords, patterns: give at least one"),
        ({"keywords": [" "]}, "a keyword is blank"),
        ({"patterns": ["("]}, "is not a regular expression"),
        ({"patterns": ["a*"]}, "matches an empty text"),
        ({"keywords": ["a"], "metric": "sum"}, "metric: 'sum' is not allowed"),
    ],
)
def test_bad_settings(content: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        validate(PatternScorer, content, "here")
