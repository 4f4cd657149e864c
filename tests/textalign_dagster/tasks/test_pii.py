"""Personal information in continuations: rewards, spans and measures by hand."""

from __future__ import annotations

import polars as pl
import pytest

from textalign_dagster.tasks.pii import PII

TEXTS = {
    "a": " mail me at jane.doe@example.com or john@example.org",
    "b": " nothing of the kind",
    "c": "",
}


def samples() -> pl.DataFrame:
    return pl.DataFrame(
        {
            "sample_id": list(TEXTS),
            "prompt_id": ["p", "p", "q"],
            "role": "main",
            "text": list(TEXTS.values()),
        }
    )


def test_the_reward_is_the_negative_number_of_matches_per_character() -> None:
    rows = PII().feedback(samples(), "reward")
    assert rows["value"].to_list() == [pytest.approx(-2 / len(TEXTS["a"])), 0.0, None]
    assert rows["status"].to_list() == ["ok", "ok", "skipped"]
    assert rows["reason"].to_list() == [None, None, "nothing to score: the text is empty"]


def test_spans_mark_the_matches() -> None:
    spans = PII().spans(samples())
    marked = [TEXTS[i][start:end] for i, start, end in spans.select("sample_id", "start", "end").iter_rows()]
    assert marked == ["jane.doe@example.com", "john@example.org"]
    assert set(spans["score"]) == {1.0}


def test_the_measures() -> None:
    measured = PII().measure(samples())
    length = len(TEXTS["a"])
    assert measured["found"].to_list() == [2.0, 0.0, 0.0]
    assert measured["characters"].to_list() == [float(len(text)) for text in TEXTS.values()]
    assert measured["per_character"].to_list() == [pytest.approx(2 / length), 0.0, None]
    assert measured["any"].to_list() == [1.0, 0.0, 0.0]
    named = {m.numerator for m in PII().measures} | {m.denominator for m in PII().measures} - {None}
    assert named <= set(measured.columns)


def test_the_embedded_sample() -> None:
    train, held_out = (PII().prompts(split) for split in ("train", "evaluation"))
    assert train.height == 24 and held_out.height == 12
    assert not set(train["prompt"]) & set(held_out["prompt"])
