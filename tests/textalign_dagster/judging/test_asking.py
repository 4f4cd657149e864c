"""Questions about samples and the feedback built from the answers, without calling a judge."""

from __future__ import annotations

import json
from typing import Any

import polars as pl
import pytest

from textalign_dagster.judging import Answer, Judged, Reply, Verdict, asking, template_of
from textalign_dagster.judging.repeats import combined
from textalign_dagster.judging.verdict import failed, unparseable
from textalign_dagster.settings import SettingsError
from textalign_dagster.settings.judge import Judge
from textalign_dagster.tables import FEEDBACK

COLUMNS = ("sample_id", "prompt_id", "prompt", "reference", "text")


def samples(*rows: tuple[str, str, str | None, str]) -> pl.DataFrame:
    """(sample, prompt, reference, text); a prompt is its own id."""
    full = [(sample, prompt, prompt, reference, text) for sample, prompt, reference, text in rows]
    return pl.DataFrame(full, dict.fromkeys(COLUMNS, pl.String), orient="row")


def make_judge(**settings: Any) -> Judge:
    return Judge.model_validate({"model": "m", "template": settings.get("ask", "rating"), **settings})


def answered(judge: Judge, frame: pl.DataFrame, *answers: Any) -> Judged:
    asked = asking(judge, frame)
    assert len(asked.questions) == len(answers)
    return asked.judged([Answer(Reply(json.dumps(a)), f"k{n}") for n, a in enumerate(answers)])


def test_combining_repeated_verdicts() -> None:
    def rated(*values: float) -> list[Verdict]:
        return [Verdict("ok", value=value, text=f"says {value:g}") for value in values]

    down, odd = failed("down"), unparseable("what?")
    assert combined([down, *rated(2, 3), odd]) == Verdict("ok", value=2.5, text="says 2")
    labels = [Verdict("ok", label=label, analysis=label + "!") for label in ("x", "y", "y", "x")]
    assert combined(labels) == labels[0], "in a tie, the first label given wins"
    assert combined(labels[1:]) == labels[1]
    flawed, fine = Verdict("ok", label="flawed", text="Wrong."), Verdict("ok", label="perfect")
    assert combined([flawed, fine, fine]) == fine, "a response judged perfect has no critique"
    assert combined([odd, down, odd]) == down
    assert combined([odd]) == odd


def test_groups_share_prompt_and_reference() -> None:
    frame = samples(
        ("s1", "p", None, "a"), ("t1", "q", None, "b"), ("s2", "p", None, "c"), ("s3", "p", None, "d")
    )
    judged = answered(
        make_judge(ask="rating", group=2),
        frame,
        {"1": {"analysis": ".", "rating": 1}, "2": {"analysis": ".", "rating": 2}},
        {"1": {"analysis": ".", "rating": 3}},
        {"1": {"analysis": ".", "rating": 4}},
    )
    assert judged.rows.select("sample_id", "value", "call_keys").rows() == [
        ("s1", 1.0, ["k0"]), ("t1", 4.0, ["k2"]), ("s2", 2.0, ["k0"]), ("s3", 3.0, ["k1"])
    ]  # fmt: skip
    assert judged.rows.schema == FEEDBACK and judged.pairs is None


def test_judgments() -> None:
    frame = samples(("s", "p", None, "a"), ("t", "p", None, "b"))
    replies = [{"analysis": ".", "judgment": text} for text in ("It is wrong.", "perfect")]
    judged = answered(make_judge(ask="judgment"), frame, *replies)
    assert judged.rows.select("label", "text", "kind").rows() == [
        ("flawed", "It is wrong.", "judgment"),
        ("perfect", None, "judgment"),
    ]


def test_template_with_references_skips_samples_without_one(tmp_path: Any) -> None:
    path = tmp_path / "against.yaml"
    path.write_text(
        "name: against\nversion: 1\nask: rating\nscale: {low: 1, high: 5}\nsystem: Grade.\n"
        "user: |\n  {prompt}\n  {reference}\n  {response}\n"
    )
    frame = samples(("s", "p", "good", "a"), ("t", "q", None, "b"), ("u", "r", " ", "c"))
    judged = answered(make_judge(ask="rating", template=str(path)), frame, {"rating": 4})
    assert judged.rows.select("sample_id", "status", "reason").rows() == [
        ("s", "ok", None),
        ("t", "skipped", "its prompt has no reference"),
        ("u", "skipped", "its prompt has no reference"),
    ]


def test_single_and_identical_samples_need_no_calls() -> None:
    frame = samples(("s", "p", None, "same"), ("t", "p", None, "same"), ("u", "q", None, "alone"))
    judged = answered(make_judge(ask="ranking"), frame)
    assert judged.pairs is not None
    assert judged.pairs.select("winner", "favoured", "call_keys").rows() == [("tie", None, [])]
    assert judged.rows.select("sample_id", "value", "status", "reason").rows() == [
        ("s", 0.5, "ok", None),
        ("t", 0.5, "ok", None),
        ("u", None, "skipped", "its prompt has no other sample to compare it with"),
    ]
    few = asking(
        make_judge(ask="ranking", pairs=1), samples(*[(f"s{n}", "p", None, str(n)) for n in range(4)])
    )
    ab, ba = few.questions
    drawn = few.judged([Answer(Reply('{"analysis": ".", "better": "a"}'), "k")] * 2).rows
    assert sorted(drawn["status"]) == ["ok", "ok", "skipped", "skipped"]
    assert ab.order_shown is not None and ba.order_shown == ", ".join(ab.order_shown.split(", ")[::-1])


def test_renaming_the_samples_does_not_change_the_verdict() -> None:
    """Ids determine which response is labelled A; the verdict must not depend on it."""

    def won(first: str, second: str) -> float | None:
        judge, texts = make_judge(ask="ranking"), {first: "good", second: "bad"}
        frame = samples(*[(sample, "p", None, text) for sample, text in texts.items()])
        asked = asking(judge, frame)
        answers = []
        for question in asked.questions:
            shown = question.call.messages[-1]["content"]
            better = "a" if shown.index("good") < shown.index("bad") else "b"
            answers.append(Answer(Reply(json.dumps({"analysis": ".", "better": better})), "k"))
        value = asked.judged(answers).rows.filter(sample_id=first)["value"][0]
        return float(value)

    assert won("a", "b") == won("b", "a") == 1.0


def test_duplicate_sample_is_rejected() -> None:
    with pytest.raises(ValueError, match="sample s is listed twice"):
        asking(make_judge(ask="rating"), samples(("s", "p", None, "a"), ("s", "p", None, "b")))


def test_scale_of_the_judge_replaces_that_of_the_template() -> None:
    template = template_of(make_judge(ask="rating", scale={"low": 0, "high": 10}))
    assert template.scale is not None and (template.scale.low, template.scale.high) == (0, 10)
    assert [example.answer["rating"] for example in template.examples] == [2, 10]  # 2 and 7 of 1 to 7
    with pytest.raises(
        SettingsError, match=r"judge\.scale: not valid for the template rating: low and high must"
    ):
        template_of(make_judge(ask="rating", scale={"low": 0, "high": 0.5}))
    with pytest.raises(
        SettingsError, match=r"judge\.ask: 'rating', but the template ranking asks for 'ranking'"
    ):
        template_of(make_judge(ask="rating", template="ranking"))
