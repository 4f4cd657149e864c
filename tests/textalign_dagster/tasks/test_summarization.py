"""TL;DR: ROUGE worked out by hand, the measures, the embedded sample."""

from __future__ import annotations

from typing import Any

import polars as pl
import pytest

from textalign_dagster.measures.rouge import rouge_l, rouge_n, words
from textalign_dagster.tasks import Summarization
from textalign_dagster.tasks.dataset_rows import BadRow
from textalign_dagster.tasks.summarization import CUE


def test_words_are_runs_of_letters_and_digits() -> None:
    assert words("The cat's 2nd HAT—red; 3.5€") == ["the", "cat", "s", "2nd", "hat", "red", "3", "5"]
    assert words("снег") == []


@pytest.mark.parametrize(
    ("summary", "reference", "one", "two", "longest"),
    [
        # shared words: the, cat, the, mat (clipped: "the" twice in both) of 6 and 6;
        # pairs: "the cat", "the mat" of 5 and 5; longest common subsequence: the cat the mat
        ("the cat lay under the mat", "the cat sat on the mat", 2 * 4 / 12, 2 * 2 / 10, 2 * 4 / 12),
        # P = 2/2, R = 2/4: F = 2/3; the pair "police killed" of 1 and 3; the whole summary is in order
        ("police killed", "police killed the gunman", 2 * 2 / 6, 2 * 1 / 4, 2 * 2 / 6),
        # the same words in another order: "the gunman" is the longest common subsequence
        ("the gunman killed police", "police killed the gunman", 1.0, 2 * 1 / 6, 2 * 2 / 8),
        # a word counts as often as in the text with fewer occurrences
        ("a a a a", "a b", 2 * 1 / 6, 0.0, 2 * 1 / 6),
        ("x", "y", 0.0, 0.0, 0.0),
        ("", "y", 0.0, 0.0, 0.0),
    ],
)
def test_rouge_by_hand(summary: str, reference: str, one: float, two: float, longest: float) -> None:
    left, right = words(summary), words(reference)
    assert rouge_n(left, right, 1) == pytest.approx(one)
    assert rouge_n(left, right, 2) == pytest.approx(two)
    assert rouge_l(left, right) == pytest.approx(longest)
    assert rouge_l(right, left) == pytest.approx(longest)


def samples(*rows: tuple[str, str | None, float | None]) -> pl.DataFrame:
    return pl.DataFrame(
        [
            {
                "sample_id": str(i),
                "prompt_id": f"p{i}",
                "prompt": f"A post.\n{CUE}",
                "reference": reference,
                "role": "main",
                "text": text,
                "finish_reason": "length" if i == 0 else "stop",
                "n_tokens": 4,
                "score": score,
                "label": None,
            }
            for i, (text, reference, score) in enumerate(rows)
        ],
        schema_overrides={"reference": pl.String, "score": pl.Float64, "label": pl.String},
    )


def test_measures_are_null_where_there_is_nothing_to_measure() -> None:
    rows = samples((" a b c", "a b", 1.5), (" a b", None, None), (" x", "снег", 0.5), ("", "a", None))
    measured = Summarization().measure(rows)
    assert measured["sample_id"].to_list() == ["0", "1", "2", "3"]
    assert measured["score"].to_list() == [1.5, None, 0.5, None]
    assert measured["rouge_1"].to_list() == [pytest.approx(2 * 2 / 5), None, None, 0.0]
    assert measured["rouge_l"].to_list() == [pytest.approx(2 * 2 / 5), None, None, 0.0]
    assert measured["words"].to_list() == [3.0, 2.0, 1.0, 0.0]
    assert measured["cut_off"].to_list() == [1.0, 0.0, 0.0, 0.0]
    # pooled: a, b, c, x of six words; "a b", "b c" of six words
    assert measured["dist_1_pooled"].to_list() == [pytest.approx(4 / 6), None, None, None]
    assert measured["dist_2_pooled"].to_list() == [pytest.approx(2 / 6), None, None, None]
    named = {m.numerator for m in Summarization().measures}
    assert named == set(measured.columns) - {"sample_id"}
    assert set(measured.drop("sample_id").dtypes) == {pl.Float64}


def test_columns_are_numeric_even_without_scores_and_references() -> None:
    measured = Summarization().measure(samples(("a", None, None)).with_columns(score=pl.lit(None)))
    assert measured["score"].dtype == measured["rouge_2"].dtype == pl.Float64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "A post."}, "does not end with 'TL;DR:'"),
        ({"prompt": "A post. TL;DR: done"}, "does not end with 'TL;DR:'"),
        ({"prompt": " TL;DR: "}, "no post before the cue"),
        ({"prompt": None}, "no prompt"),
    ],
)
def test_invalid_posts_are_rejected(values: dict[str, Any], message: str) -> None:
    with pytest.raises(BadRow, match=message):
        Summarization().row({"reference": None, **values})


def test_a_cue_inside_the_post_is_kept() -> None:
    post = "TITLE: My TL;DR: is longer\nPOST: I wrote TL;DR: twice.\nTL;DR:"
    row = Summarization().row({"prompt": f"\n{post}\n\n", "reference": "TL;DR: no"})
    assert (row.prompt, row.reference) == (post, "TL;DR: no")


def test_the_embedded_sample() -> None:
    train, evaluation = Summarization().prompts("train"), Summarization().prompts("evaluation")
    assert train.height + evaluation.height >= 60 and evaluation.height >= 20
    assert not set(train["prompt"]) & set(evaluation["prompt"])
    assert Summarization().notes == ()
    for frame in (train, evaluation):
        assert frame["reference"].null_count() == 0
        assert all(p.startswith("SUBREDDIT: r/") and p.endswith(f"\n{CUE}") for p in frame["prompt"])
        # Each summary is much shorter than its post and about the same things.
        for prompt, reference in frame.select("prompt", "reference").iter_rows():
            assert 6 <= len(words(reference)) < len(words(prompt)) / 2
            assert rouge_n(words(prompt), words(reference), 1) > 0.1
