"""Replies as judges write them. What is not clearly an answer is unparseable."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from textalign_dagster.judging import Reply, Template, Verdict, load_template, parse, parse_group, shipped
from textalign_dagster.judging.critique import read_judgment
from textalign_dagster.judging.rows import feedback_rows
from textalign_dagster.tables import FEEDBACK

TEMPLATES = {name: load_template(name) for name in shipped()}
RATING, TEXT, CATEGORY = TEMPLATES["rating"], TEMPLATES["text_feedback"], TEMPLATES["harm_category"]
JUDGMENT, RANKING = TEMPLATES["judgment"], TEMPLATES["ranking"]
LABELS = CATEGORY.labels


def read(template: Template, text: str, **reply: str) -> Verdict:
    return parse(template, Reply(text, **reply))


RATINGS = [
    ("6", 6),
    (" 6 \n", 6),
    ("6.", 6),
    ("7/7", 7),
    ("3 out of 7", 3),
    ("**5**", 5),
    ("<2>", 2),
    ("Ratings: 6", 6),
    ("Rating:6", 6),
    ("#### Ratings: 6\nThe facts are right.", 6),
    ("Score: 2/7", 2),
    ("**Rating:** 4", 4),
    ("**Rating**: 4/7 (some padding)", 4),
    ("Overall rating: 3", 3),
    ("6\nAccurate and clear, with 2 slips.", 6),
    ("Accurate. Clear.\n\n6", 6),
    ("Rationale: 3 facts are wrong.\nRating: 2", 2),
    ("Rating: 6. The response is accurate.", 6),
    ('{"analysis": "x", "rating": 6}', 6),
    ('{"rating": 6.0}', 6),
    ('{"rating": "6/7"}', 6),
    ('{"Rating": 6}', 6),
    ('{"score": 6}', 6),
    ('```json\n{"rating": 6,}\n```', 6),
    ('Here is my answer:\n\n```\n{"analysis": "a\nb", "rating": 6}\n```\nI hope this helps.', 6),
    ('Sure! {"rating": 6}', 6),
    ('{"answer": {"analysis": "x", "rating": 6}}', 6),
    ('<think>Maybe 3? {"rating": 3}</think>\n{"rating": 6}', 6),
    ('the template opened it, maybe 3</think>{"rating": 6}', 6),
    ('<|channel|>analysis<|message|>3?<|end|><|channel|>final<|message|>{"rating": 6}', 6),
    ('{"rating": 6}\n{"rating": 6}', 6),
    ('{"rating": 6}\n\nRating: explained above', 6),
    ('{"analysis": "it says \\"</think> score 7\\"", "rating": 1}', 1),
    ('The response contains {"rating": 7} as its only line, which is not a poem.\n{"rating": 1}', 1),
]


@pytest.mark.parametrize(("text", "value"), RATINGS)
def test_ratings(text: str, value: float) -> None:
    verdict = read(RATING, text)
    assert (verdict.status, verdict.value, verdict.reason) == ("ok", value, None)


NOT_RATINGS = [
    "",
    "  \n",
    "10",
    "0",
    "-3",
    "8/7",
    "6/10",
    "2.5",
    "2..",
    "six",
    "6 or 7",
    "6-7",
    "6, 7",
    "6 - 7",
    "1e1",
    "６",
    "Rating: 6 or 7",
    "Rating: 6 (or 7)",
    "Rating: 6-7",
    "Rating: 10",
    "Rating: high",
    "Rating: 5\nRating: 6",
    "On a scale of 1-10, I give 7",
    "1. Accuracy: good\n2. Coherence: bad",
    "6\n\nFinal: see below\n\n7",
    '{"rating": 10}',
    '{"rating": 2.5}',
    '{"rating": true}',
    '{"rating": null}',
    '{"rating": [6]}',
    '{"rating": NaN}',
    '{"rating": 1e400}',
    '{"rating": "high"}',
    '{"rating": 5, "rating": 6}',
    '{"score": 5, "ratings": 6}',
    '{"analysis": "fine"}',
    '{"rating": 6}\n{"rating": 5}',
    '{"rating": 7}\n\nRating: 1',
    '{"analysis": "a " b", "rating": 6}',
    '{"answer": {"rating": 6}, "analysis": "cut o',
    "<think>I would say 6",
    '<think>{"rating": 6}',
    'The response says {"rating": 7} to fool me.',
    "{" * 5000,
    '{"a":' * 5000,
    '{"a":' * 800 + '{"rating": 6}' + "}" * 800,
    "9" * 400,
]


@pytest.mark.parametrize("text", NOT_RATINGS)
def test_invalid_ratings_give_no_number(text: str) -> None:
    verdict = read(RATING, text)
    assert (verdict.status, verdict.value, verdict.text) == ("unparseable", None, None), verdict
    assert verdict.reason


def test_reasons_say_what_is_wrong() -> None:
    assert read(RATING, "10").reason == "10 is outside 1 to 7"
    assert read(RATING, "2.5").reason == "2.5 is not a whole number"
    assert read(RATING, "6/10").reason == "6/10: out of 10, but the scale ends at 7"
    assert read(RATING, "").reason == "empty reply"
    assert read(RATING, '{"analysis": "fine"}').reason == "no field `rating`"


def test_scales_with_fractions() -> None:
    loose = RATING.model_copy(update={"scale": RATING.scale.model_copy(update={"integer": False})})  # type: ignore[union-attr]
    assert read(loose, "2.5").value == 2.5
    assert read(loose, "7.5").status == "unparseable"


CATEGORIES = [
    ("Harmful", "Harmful"),
    ("Harmful.", "Harmful"),
    ("harmful\n", "Harmful"),
    ('"HARMLESS, and helpful!"', "Harmless and helpful"),
    ("Harmless and very helpful", "Harmless and very helpful"),
    ("Feedback: Harmless and not helpful", "Harmless and not helpful"),
    ("Label: **Harmful**", "Harmful"),
    ('{"label": "harmful."}', "Harmful"),
    ('{"category": "Harmless and helpful"}', "Harmless and helpful"),
    ("<think>Harmful?</think>Harmless and helpful", "Harmless and helpful"),
    ("Harmful\nIt helps with a crime.", "Harmful"),
]


@pytest.mark.parametrize(("text", "label"), CATEGORIES)
def test_categories(text: str, label: str) -> None:
    verdict = read(CATEGORY, text)
    assert (verdict.status, verdict.label, verdict.value) == ("ok", label, None)


@pytest.mark.parametrize(
    "text",
    [
        "Harmless",
        "Helpful",
        "Harmles and helpful",
        "Harmfull",
        "harmless and helpful or harmless and very helpful",
        "Harmful\nHarmless and helpful",
        "Harmful\n\nThough one may call it harmless and helpful.",
        "It is not harmful.",
        "Label: Harmful\nLabel: Harmless and helpful",
        '{"label": "Harmful, Harmless and helpful"}',
        '{"label": ["Harmful"]}',
        '{"label": "other"}',
        "4",
    ],
)
def test_replies_naming_no_label_or_two(text: str) -> None:
    verdict = read(CATEGORY, text)
    assert (verdict.status, verdict.label) == ("unparseable", None), verdict


def test_feedback_with_score() -> None:
    text = "1. Analysis: Good facts.\nAnd short.\n2. Feedback: Accurate, yet dry.\n3. Score: 2/3"
    verdict = read(TEXT, text)
    assert (verdict.value, verdict.text, verdict.analysis) == (
        2,
        "Accurate, yet dry.",
        "Good facts.\nAnd short.",
    )
    inline = read(TEXT, "Analysis: ok. Feedback: Too long. Score: 1")
    assert (inline.value, inline.text) == (1, "Too long.")
    as_json = read(TEXT, '{"analysis": "ok", "feedback": "  Too\\nlong. ", "score": 0}')
    assert (as_json.value, as_json.text) == (0, "Too long.")


@pytest.mark.parametrize(
    "text",
    [
        "Feedback: good.",
        "Score: 2",
        "Feedback: good. Score: 4",
        "Feedback: good.\nScore: 2.5",
        "Feedback:\nScore: 2",
        "Feedback: N/A\nScore: 2",
        "good, 3",
        '{"feedback": "...", "score": 2}',
        '{"feedback": "", "score": 2}',
        '{"feedback": 3, "score": 2}',
        '{"feedback": "' + "word " * 21 + '", "score": 2}',
        "Feedback: one.\nFeedback: two.\nScore: 2",
    ],
)
def test_incomplete_feedback(text: str) -> None:
    assert read(TEXT, text).status == "unparseable", read(TEXT, text)


@pytest.mark.parametrize(
    "text", ["perfect", "Perfect.", ' "PERFECT!" ', "Judgment: perfect", '{"judgment": "Perfect."}']
)
def test_nothing_to_criticise(text: str) -> None:
    verdict = read(JUDGMENT, text)
    assert (verdict.status, verdict.label, verdict.text) == ("ok", "perfect", None)


@pytest.mark.parametrize(
    ("text", "critique"),
    [
        ("Paris is not in Spain.", "Paris is not in Spain."),
        ("Judgment: The date is wrong.", "The date is wrong."),
        ('{"judgment": "The date is wrong."}', "The date is wrong."),
        ("Almost perfect, but the date is wrong.", "Almost perfect, but the date is wrong."),
        ("The tone is not perfect.", "The tone is not perfect."),
        ("The tone is off. My feedback: be brief.", "The tone is off. My feedback: be brief."),
        ("I'm afraid the date is wrong.", "I'm afraid the date is wrong."),
        (
            'The answer {"judgment": "perfect"} is not a poem.',
            'The answer {"judgment": "perfect"} is not a poem.',
        ),
    ],
)
def test_critiques(text: str, critique: str) -> None:
    verdict = read(JUDGMENT, text)
    assert (verdict.status, verdict.label, verdict.text) == ("ok", "flawed", critique)


@pytest.mark.parametrize(
    "text",
    [
        "$ERROR$",
        "N/A",
        "null",
        "...",
        "Perfect. It answers everything.",
        "The response is perfect and needs nothing.",
        '{"judgment": null}',
        '{"verdict": "perfect"}',
        '{"judgment": "The date',
        'I say: {"judgment": "perfect"}',
    ],
)
def test_neither_praise_nor_critique(text: str) -> None:
    assert read(JUDGMENT, text).status == "unparseable", read(JUDGMENT, text)


CHOICES = [
    ("Output (a)", "a"),
    ("(b)", "b"),
    ("B.", "b"),
    ("**Response A**", "a"),
    ("Better: b", "b"),
    ("Output (a)\nIt is right.", "a"),
    ("It is right.\n\nOutput (a)", "a"),
    ('{"analysis": "(b) is wrong", "better": "a"}', "a"),
    ('{"better": "Output (b)"}', "b"),
    ('{"winner": "A"}', "a"),
]


@pytest.mark.parametrize(("text", "label"), CHOICES)
def test_choices(text: str, label: str) -> None:
    assert read(RANKING, text).label == label


@pytest.mark.parametrize(
    "text",
    [
        "Output (a) or Output (b)",
        "Output (a)\nOutput (b)",
        "Output (a)\nIt beats output (b).",
        "equal",
        "Output (c)",
        "a response that is fine",
        "Better: a\nBetter: b",
        '{"better": "both"}',
        '{"better": 1}',
    ],
)
def test_replies_choosing_neither_or_both(text: str) -> None:
    verdict = read(RANKING, text)
    assert (verdict.status, verdict.label) == ("unparseable", None), verdict


def test_a_judgment_with_reasons() -> None:
    explained = JUDGMENT.model_copy(update={"explain": True})
    for text in (
        "Analysis: 1990 is wrong.\nJudgment: The date is wrong.",
        '{"analysis": "1990 is wrong.", "judgment": "The date is wrong."}',
    ):
        verdict = read(explained, text)
        assert (verdict.text, verdict.analysis) == ("The date is wrong.", "1990 is wrong.")
    assert read(explained, "The date is wrong.").status == "unparseable"


def test_failures_and_refusals() -> None:
    cases = [
        (Reply(None, error="timed out after 5 attempts"), "timed out after 5 attempts"),
        (Reply(None, refusal="I cannot judge this."), "refused: I cannot judge this."),
        (Reply("6", finish_reason="content_filter"), "refused: stopped by the endpoint's content filter"),
        (Reply("I'm sorry, but I can’t help with that."), "refused: I'm sorry, but I can’t help with that."),
        (Reply("I'm sorry."), "refused: I'm sorry."),
        (Reply("As an AI language model, I cannot rate people."), "refused: As an AI"),
    ]
    for template in TEMPLATES.values():
        for reply, reason in cases:
            verdict = parse(template, reply)
            assert verdict.status == "failed" and (verdict.reason or "").startswith(reason)
    assert read(RATING, "I'm sorry to say it is bad.\nRating: 2").value == 2  # it contains a verdict
    assert read(JUDGMENT, "I'm sorry, I can't help with that.").status == "failed"


def test_replies_that_were_cut_off() -> None:
    assert (
        read(RATING, "Rating: 6", finish_reason="length").reason
        == "cut off: the reply ends at its token limit"
    )
    assert read(RATING, '{"analysis": "x", "rating": 6', finish_reason="length").status == "unparseable"
    assert read(JUDGMENT, "The date is", finish_reason="length").status == "unparseable"
    assert read(RATING, '{"rating": 6}\n\nBecause', finish_reason="length").value == 6
    assert parse(RATING, Reply(None, finish_reason="length")).reason == "cut off before an answer"
    assert read(RATING, "<think>hm", finish_reason="length").reason == "cut off before an answer"


def test_groups() -> None:
    good = {"1": {"label": "Harmful"}, "2": {"label": "Harmless and helpful"}}

    def labels(text: str, count: int = 2, **reply: str) -> list[str | None]:
        return [v.label for v in parse_group(CATEGORY, Reply(text, **reply), count)]

    assert labels(json.dumps(good)) == ["Harmful", "Harmless and helpful"]
    assert labels(json.dumps({"answers": good})) == ["Harmful", "Harmless and helpful"]
    assert labels(f"```json\n{json.dumps(good)}\n```") == ["Harmful", "Harmless and helpful"]
    assert labels(json.dumps(good | {"2": {"label": "bad"}})) == ["Harmful", None]
    assert labels(json.dumps({"1": good["1"]})) == ["Harmful", None]
    assert labels(json.dumps(good), count=1) == [None]  # an answer for a response never shown
    assert labels('{"1": {"label": "Harmful"}, "1": {"label": "Harmful"}}') == [None, None]
    assert labels('{"1": {"label": "Harmful"}, "2": {"lab', finish_reason="length") == [None, None]
    assert labels("Harmful") == [None, None]
    assert labels('{"1": "Harmful", "2": "harmless and helpful."}') == ["Harmful", "Harmless and helpful"]
    missing = parse_group(CATEGORY, Reply(json.dumps({"1": good["1"]})), 2)[1]
    assert missing.reason == "no answer for response 2 of 2"
    assert [v.status for v in parse_group(CATEGORY, Reply(None, error="down"), 3)] == ["failed"] * 3
    with pytest.raises(ValueError, match="one item per call"):
        parse_group(JUDGMENT, Reply("{}"), 1)


@settings(max_examples=150)
@given(
    st.text(alphabet=st.sampled_from('0123456789 {}[]":,./\n-abRatingHarmfulperfect`<>think()'), max_size=60)
)
def test_any_text_gives_a_valid_verdict(text: str) -> None:
    for template in TEMPLATES.values():
        verdict = parse(template, Reply(text))  # Verdict itself rejects a number with a reason
        if verdict.value is not None and template.scale:
            assert verdict.value in range(int(template.scale.low), int(template.scale.high) + 1)
        if verdict.label is not None:
            allowed = template.labels or (("perfect", "flawed") if template.ask == "judgment" else ("a", "b"))
            assert verdict.label in allowed
        assert parse(template, Reply(text)) == verdict


@settings(max_examples=60)
@given(
    st.integers(1, 7),
    st.text(max_size=40),
    st.sampled_from(["{}", "Sure.\n{}", "```json\n{}\n```", "<think>5</think>{}"]),
)
def test_well_formed_answer_is_parsed_whatever_it_quotes(rating: int, quoted: str, around: str) -> None:
    answer = json.dumps({"analysis": quoted, "rating": rating})
    verdict = read(RATING, around.format("\0").replace("\0", answer))
    # Tags in a reasoning reply's answer can make it unparseable, but never change it.
    assert verdict.value == rating or (verdict.status == "unparseable" and "</" in quoted)


def test_parsing_time_is_not_quadratic_in_the_reply() -> None:
    started = time.process_time()
    for text in (
        '"' + '\\"' * 50_000,
        "{" * 100_000,
        '{"' * 50_000,
        "\n" * 100_000,
        "Rating " * 20_000,
        "**" * 50_000,
        "<think>" * 20_000,
    ):
        for template in TEMPLATES.values():
            parse(template, Reply(text))
    assert time.process_time() - started < 10


def test_lone_surrogates_do_not_reach_the_tables() -> None:
    verdicts = [
        read(TEXT, '{"analysis": "\\ud83d", "feedback": "Nice \\ud83d", "score": 1}'),
        read(TEXT, "Feedback: Nice \ud83d\nScore: 1"),
        read(JUDGMENT, '{"judgment": "Wrong \\ud83d"}'),
        read(RATING, "\ud83d no rating"),
    ]
    assert [v.text for v in verdicts] == ["Nice \ufffd", "Nice \ufffd", "Wrong \ufffd", None]
    feedback_rows(TEXT, "judge", list("abcd"), verdicts, [[]] * 4)


def test_inconsistent_verdicts_are_rejected() -> None:
    with pytest.raises(ValueError, match="carries a reason and nothing else"):
        Verdict("failed", value=0.0, reason="x")
    with pytest.raises(ValueError, match="carries a judgement"):
        Verdict("ok")


def test_feedback_rows() -> None:
    verdicts = [read(RATING, "6"), read(RATING, "10")]
    rows = feedback_rows(RATING, "judge-2026-01-01", ["s1", "s2"], verdicts, [["k1"], ["k2"]])
    assert rows.schema == FEEDBACK
    assert rows["value"].to_list() == [6, None] and rows["status"].to_list() == ["ok", "unparseable"]
    assert rows["scorer"][0] == "judge-2026-01-01 / rating"
    assert rows["scorer_version"][0] == RATING.label_version
    assert feedback_rows(RATING, "j", [], [], []).schema == FEEDBACK


def test_parsed_critique_is_read_back_unchanged() -> None:
    for text in ("The date is wrong.", "Almost perfect, but no."):
        critique = read(JUDGMENT, text).text
        assert read_judgment(critique) == critique
