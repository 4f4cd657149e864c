"""n-gram entropy and Self-BLEU against hand-computed values."""

from __future__ import annotations

import math

import pytest

from textalign_dagster.measures.diversity import ngram_entropy, self_bleu
from textalign_dagster.measures.statistics import worst_of


def test_entropy_of_ngrams_in_nats() -> None:
    # "a" twice and "b" once.
    assert ngram_entropy(["a b", "a"], 1) == pytest.approx(
        -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    )
    # Only one bigram lies within a text.
    assert ngram_entropy(["a b", "a"], 2) == 0
    assert ngram_entropy(["a b c d"], 2) == pytest.approx(math.log(3))
    assert ngram_entropy(["", "a"], 2) is None


def test_self_bleu_by_hand() -> None:
    pytest.importorskip("sacrebleu")
    assert self_bleu(["a b c d e f"] * 3) == pytest.approx(1.0)
    assert self_bleu(["a b", "a c"], n=1) == pytest.approx(1 / 2)
    # Precisions 2/3 and 1/2.
    assert self_bleu(["a b c", "a b d"], n=2) == pytest.approx(math.sqrt(2 / 3 * 1 / 2))
    # No bigram in common: a count of 0 is smoothed to 0.1.
    assert self_bleu(["a b c", "b a d"], n=2) == pytest.approx(math.sqrt(2 / 3 * 0.1 / 2))
    # By words, not by characters: these share all characters but no word, so the score is 0.
    assert self_bleu(["abc", "cab"], n=1) == 0
    assert self_bleu(["return 1"] * 2, n=5) == pytest.approx(1.0)
    assert self_bleu(["alone"]) is None


def test_self_bleu_compares_with_the_first_texts_only() -> None:
    pytest.importorskip("sacrebleu")
    texts = ["a b", "a c", "x y", "x y"]
    # One reference: the second text for the first, the first for all others; only "a" is shared, in two of four cases.
    assert self_bleu(texts, n=1, references=1) == pytest.approx((1 / 2 + 1 / 2) / 4)


def test_worst_of_each_group() -> None:
    """Seven scores in groups of three: samples 0, 2, 4 and 1, 3, 5; the last one fills no group."""
    scores = [0.1, 0.9, 0.3, 0.2, 0.2, 0.4, 5.0]
    assert worst_of(scores, "lower", 3) == pytest.approx((0.3 + 0.9) / 2)
    assert worst_of(scores, "higher", 3) == pytest.approx((0.1 + 0.2) / 2)
    assert worst_of([0.1, None, 0.3, 0.2], "lower", 3) == pytest.approx(0.3)
    assert worst_of(scores, "lower") is None and worst_of([None], "lower", 1) is None
