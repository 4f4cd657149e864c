"""Toxicity: the published numbers worked out by hand, RealToxicityPrompts' schema, the embedded sample."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from textalign_dagster.experiment import Experiment
from textalign_dagster.reports.score_table import score_table
from textalign_dagster.scorers import ToxicityScorer
from textalign_dagster.settings import SettingsError, validate
from textalign_dagster.tasks import Toxicity


def task(**settings: Any) -> Toxicity:
    validated: Toxicity = validate(Toxicity, settings, "x")
    return validated


def samples(*rows: tuple[str, str, float | None], role: str = "main") -> pl.DataFrame:
    """Rows of prompt, text and score."""
    return pl.DataFrame(
        [
            {
                "sample_id": f"{role}{i}",
                "prompt_id": prompt,
                "prompt": prompt,
                "reference": None,
                "condition": "c",
                "role": role,
                "text": text,
                "finish_reason": "stop",
                "n_tokens": 4,
                "nll": None,
                "nll_tokens": None,
                "score": score,
                "label": None,
            }
            for i, (prompt, text, score) in enumerate(rows)
        ],
        schema_overrides={
            "score": pl.Float64,
            "reference": pl.String,
            "nll": pl.Float64,
            "nll_tokens": pl.Int64,
        },
    )


def scored(rows: pl.DataFrame) -> dict[str, float]:
    table = score_table(rows, task().measure(rows), task().measures, policy_hash="x", resamples=100)
    return dict(table.select("metric", "value").iter_rows())


def test_average_maximum_and_probability_by_hand() -> None:
    rows = samples(
        ("p", "one", 0.1), ("q", "two", 0.7), ("p", "three", 0.5), ("q", "four", 0.9), ("r", "five", None),
        ("r", "six", 0.2), ("s", "seven", None),
    )  # fmt: skip
    scores = scored(rows)
    # The highest of p, q and r (s has no score at all): 0.5, 0.9, 0.2; only q's is above 0.5.
    assert scores["average_max_toxicity"] == pytest.approx((0.5 + 0.9 + 0.2) / 3)
    assert scores["toxicity_probability"] == pytest.approx(1 / 3)
    assert scores["toxicity"] == pytest.approx((0.1 + 0.5 + 0.7 + 0.9 + 0.2) / 5)


def test_distinct_n_per_prompt_and_pooled() -> None:
    """The golden values of the texts "a b a" and "b c": 3/5, 3/5, 1/5."""
    golden = samples(("p", "a b a", 0.0), ("p", "b c", 0.0))
    scores = scored(golden)
    for form in ("", "_pooled"):
        assert [scores[f"dist_{n}{form}"] for n in (1, 2, 3)] == pytest.approx([3 / 5, 3 / 5, 1 / 5])
    # A second prompt whose words are all new and distinct: 2/2, 1/2, 0/2.
    scores = scored(
        pl.concat([golden, samples(("q", "x y", 0.0), role="main").with_columns(sample_id=pl.lit("q"))])
    )
    assert [scores[f"dist_{n}"] for n in (1, 2, 3)] == pytest.approx([4 / 5, 11 / 20, 1 / 10])
    assert [scores[f"dist_{n}_pooled"] for n in (1, 2, 3)] == pytest.approx([5 / 7, 4 / 7, 1 / 7])


def test_diversity_covers_main_samples_and_has_no_interval_if_pooled() -> None:
    rows = pl.concat(
        [samples(("p", "a a", 0.1), ("q", "b c", 0.1)), samples(("p", "x y z", 0.1), role="probe")]
    )
    measured = task().measure(rows)
    assert measured["dist_1"].to_list() == [0.5, 1.0, None]
    assert measured["dist_1_pooled"].to_list() == [0.75, None, None]
    assert measured["toxic"].to_list() == [0.0, 0.0, 0.0]
    table = score_table(rows, measured, task().measures, policy_hash="x", resamples=100)
    pooled = table.filter(metric="dist_1_pooled").row(0, named=True)
    assert (pooled["n"], pooled["lo"], pooled["hi"]) == (1, None, None)


def test_a_text_without_words_has_no_diversity() -> None:
    assert "dist_1" not in scored(samples(("p", " ", None)))


def test_the_schema_of_real_toxicity_prompts(tmp_path: Path) -> None:
    rows = [
        {
            "filename": f"{i}.txt",
            "challenging": False,
            "prompt": {"text": f" Somebody said {i} times that", "toxicity": i / 20, "profanity": 0.1},
            "continuation": {"text": " it was so.", "toxicity": 0.9},
        }
        for i in range(20)
    ]
    rows[3]["prompt"]["toxicity"] = None  # type: ignore[index]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    toxicity = task(data={"path": str(path), "held_out": 10})
    held = toxicity.prompts("evaluation")["prompt"].to_list()
    assert sorted(held) == sorted(f"Somebody said {i} times that" for i in range(10))  # below 0.5, or unknown
    assert toxicity.prompts("train").height == 10
    mixed = task(data={"path": str(path), "held_out": 10}, held_out_from="all").prompts("evaluation")
    assert sorted(mixed["prompt"]) != sorted(held)
    with pytest.raises(
        SettingsError, match="held_out: 11 requested of 20 prompts, of which 10 may be held out"
    ):
        task(data={"path": str(path), "held_out": 11}).prompts("train")
    path.write_text("\n".join(json.dumps({"prompt": row["prompt"]["text"]}) for row in rows))  # type: ignore[index]
    flat = task(data={"path": str(path)}).prompts("train")["prompt"].to_list()
    assert flat == [f"Somebody said {i} times that" for i in range(20)]


def test_the_lexicon_is_the_default_scorer() -> None:
    content = {"task": "toxicity", "method": "alt_rm", "policy": {"model": "/nowhere"}}
    experiment: Experiment = validate(Experiment, content, "x")
    assert experiment.sample_scorer == ToxicityScorer()


def test_the_embedded_sample() -> None:
    train, evaluation = task().prompts("train"), task().prompts("evaluation")
    assert train.height + evaluation.height >= 60 and evaluation.height >= 20
    assert not set(train["prompt"]) & set(evaluation["prompt"])
    assert task().notes == ()
    # The prompts themselves are not insults: only continuations are scored, and can go either way.
    prompts = [*train["prompt"], *evaluation["prompt"]]
    scores = ToxicityScorer().score(prompts)
    assert max(score or 0.0 for score in scores) <= 0.5, [
        p for p, s in zip(prompts, scores, strict=True) if s
    ]
