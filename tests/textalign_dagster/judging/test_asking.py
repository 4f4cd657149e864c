"""What is asked of samples and what the answers make of them, without anybody being called."""

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


def a_judge(**settings: Any) -> Judge:
    return Judge.model_validate({"model": "m", "template": settings.get("ask", "rating"), **settings})


def answered(judge: Judge, frame: pl.DataFrame, *answers: Any) -> Judged:
    asked = asking(judge, frame)
    assert len(asked.questions) == len(answers)
    return asked.judged([Answer(Reply(json.dumps(a)), f"k{n}") for n, a in enumerate(answers)])


def test_repeats_of_a_verdict() -> None:
    def rated(*values: float) -> list[Verdict]:
        return [Verdict("ok", value=value, text=f"says {value:g}") for value in values]

    down, odd = failed("down"), unparseable("what?")
    assert combined([down, *rated(2, 3), odd]) == Verdict("ok", value=2.5, text="says 2")
    labels = [Verdict("ok", label=label, analysis=label + "!") for label in ("x", "y", "y", "x")]
    assert combined(labels) == labels[0], "of equally many votes the first given counts"
    assert combined(labels[1:]) == labels[1]
    flawed, fine = Verdict("ok", label="flawed", text="Wrong."), Verdict("ok", label="perfect")
    assert combined([flawed, fine, fine]) == fine, "no critique of what was found perfect"
    assert combined([odd, down, odd]) == down
    assert combined([odd]) == odd


def test_groups_share_prompt_and_reference() -> None:
    frame = samples(
        ("s1", "p", None, "a"), ("t1", "q", None, "b"), ("s2", "p", None, "c"), ("s3", "p", None, "d")
    )
    judged = answered(
        a_judge(ask="rating", group=2),
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
    said = [{"analysis": ".", "judgment": text} for text in ("It is wrong.", "perfect")]
    judged = answered(a_judge(ask="judgment"), frame, *said)
    assert judged.rows.select("label", "text", "kind").rows() == [
        ("flawed", "It is wrong.", "judgment"),
        ("perfect", None, "judgment"),
    ]


def test_a_template_that_shows_references_skips_samples_without(tmp_path: Any) -> None:
    path = tmp_path / "against.yaml"
    path.write_text(
        "name: against\nversion: 1\nask: rating\nscale: {low: 1, high: 5}\nsystem: Grade.\n"
        "user: |\n  {prompt}\n  {reference}\n  {response}\n"
    )
    frame = samples(("s", "p", "good", "a"), ("t", "q", None, "b"), ("u", "r", " ", "c"))
    judged = answered(a_judge(ask="rating", template=str(path)), frame, {"rating": 4})
    assert judged.rows.select("sample_id", "status", "reason").rows() == [
        ("s", "ok", None),
        ("t", "skipped", "its prompt has no reference"),
        ("u", "skipped", "its prompt has no reference"),
    ]


def test_who_is_alone_and_who_is_the_same() -> None:
    frame = samples(("s", "p", None, "same"), ("t", "p", None, "same"), ("u", "q", None, "alone"))
    judged = answered(a_judge(ask="ranking"), frame)
    assert judged.pairs is not None
    assert judged.pairs.select("winner", "favoured", "call_keys").rows() == [("tie", None, [])]
    assert judged.rows.select("sample_id", "value", "status", "reason").rows() == [
        ("s", 0.5, "ok", None),
        ("t", 0.5, "ok", None),
        ("u", None, "skipped", "its prompt has no other sample to compare it with"),
    ]
    few = asking(a_judge(ask="ranking", pairs=1), samples(*[(f"s{n}", "p", None, str(n)) for n in range(4)]))
    ab, ba = few.questions
    drawn = few.judged([Answer(Reply('{"analysis": ".", "better": "a"}'), "k")] * 2).rows
    assert sorted(drawn["status"]) == ["ok", "ok", "skipped", "skipped"]
    assert ab.order_shown is not None and ba.order_shown == ", ".join(ab.order_shown.split(", ")[::-1])


def test_renaming_the_samples_changes_no_verdict() -> None:
    """Ids decide who is called A; the verdict must not depend on it."""

    def won(first: str, second: str) -> float | None:
        judge, texts = a_judge(ask="ranking"), {first: "good", second: "bad"}
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


def test_a_sample_that_stands_there_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="sample s is listed twice"):
        asking(a_judge(ask="rating"), samples(("s", "p", None, "a"), ("s", "p", None, "b")))


def test_a_scale_replaces_the_templates() -> None:
    template = template_of(a_judge(ask="rating", scale={"low": 0, "high": 10}))
    assert template.scale is not None and (template.scale.low, template.scale.high) == (0, 10)
    assert [example.answer["rating"] for example in template.examples] == [2, 10]  # 2 and 7 of 1 to 7
    with pytest.raises(
        SettingsError, match=r"judge\.scale: not valid for the template rating: low and high must"
    ):
        template_of(a_judge(ask="rating", scale={"low": 0, "high": 0.5}))
    with pytest.raises(
        SettingsError, match=r"judge\.ask: 'rating', but the template ranking asks for 'ranking'"
    ):
        template_of(a_judge(ask="rating", template="ranking"))
