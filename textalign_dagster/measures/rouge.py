"""ROUGE (Lin, 2004): the word overlap of a summary with a reference.

The definition is that of the common implementations without stemming: texts are lowercased and cut
into runs of a–z and 0–9; every number is the F-score, the harmonic mean of precision and recall.
Texts in other alphabets have no words in this sense, so such references have no score.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import polars as pl

NAMES = ("rouge_1", "rouge_2", "rouge_l")

_WORD = re.compile(r"[a-z0-9]+")


def rouge(pairs: Iterable[tuple[str, str | None]]) -> pl.DataFrame:
    """ROUGE-1, -2 and -L of each (text, reference): a Float64 column for each of :data:`NAMES`; NULL without a reference."""
    return pl.DataFrame([_rouge(*pair) for pair in pairs], dict.fromkeys(NAMES, pl.Float64), orient="row")


def _rouge(text: str, reference: str | None) -> tuple[float | None, float | None, float | None]:
    right = words(reference or "")
    if not right:
        return None, None, None
    left = words(text)
    return rouge_n(left, right, 1), rouge_n(left, right, 2), rouge_l(left, right)


def words(text: str) -> list[str]:
    """The words of a text, as ROUGE counts them."""
    return _WORD.findall(text.lower())


def rouge_n(summary: Sequence[str], reference: Sequence[str], n: int) -> float:
    """F-score of the shared n-grams, each counted as often as in the text where it is rarer."""
    first, second = (
        Counter(zip(*(text[i:] for i in range(n)), strict=False)) for text in (summary, reference)
    )
    return _f(sum((first & second).values()), sum(first.values()), sum(second.values()))


def rouge_l(summary: Sequence[str], reference: Sequence[str]) -> float:
    """F-score of the longest common subsequence of words."""
    lengths = [0] * (len(reference) + 1)
    for word in summary:
        diagonal = 0
        for j, other in enumerate(reference, start=1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if word == other else max(above, lengths[j - 1])
            diagonal = above
    return _f(lengths[-1], len(summary), len(reference))


def _f(shared: int, of_summary: int, of_reference: int) -> float:
    """2PR / (P + R), which is 2 · shared / (both counts together); 0 where nothing is shared."""
    return 2 * shared / (of_summary + of_reference) if shared else 0.0
