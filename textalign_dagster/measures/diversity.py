"""distinct-n (Li et al., 2016, arXiv:1510.03055): the share of distinct n-grams in texts.

All forms here use the published ALT definition: words by whitespace, n-grams within a text, and the
number of *words* as the denominator for every n. They are not comparable with each other:

* pooled: over all texts at once. It falls as texts are added (words repeat), so it compares only
  sets of the same size; and it cannot be bootstrapped, since a text drawn twice adds words but no
  new n-gram, which biases every resample downwards;
* per prompt: over a prompt's own samples, then the mean over prompts (how varied are the answers to
  one prompt?);
* in blocks: over disjoint blocks of a fixed number of samples, then the mean over blocks. Its
  expectation does not depend on how many samples there are, and blocks can be resampled.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from textalign_dagster.measures.bootstrap import RESAMPLES, Estimate, mean


def distinct_n_words(texts: Iterable[str], n: int) -> float | None:
    """Distinct n-grams over all texts together, per word; None if there are no words."""
    if n < 1:
        raise ValueError(f"n: an n-gram has at least one word; got {n}")
    words_in_all = 0
    seen: set[tuple[str, ...]] = set()
    for text in texts:
        words = text.split()
        words_in_all += len(words)
        seen.update(zip(*(words[i:] for i in range(n)), strict=False))
    return len(seen) / words_in_all if words_in_all else None


def distinct_n_per_prompt(
    texts: Sequence[str], clusters: Sequence[str], n: int, *, resamples: int = RESAMPLES
) -> Estimate:
    """Mean over prompts of each prompt's own distinct-n; prompts without words are left out."""
    by_prompt = _by_prompt(texts, clusters)
    values = [distinct_n_words(own, n) for own in by_prompt.values()]
    found = mean(values, list(by_prompt), resamples=resamples)
    counted = sum(len(own) for own, v in zip(by_prompt.values(), values, strict=True) if v is not None)
    return Estimate(found.value, found.lo, found.hi, found.n, counted)


def distinct_n_blocks(
    texts: Sequence[str],
    clusters: Sequence[str],
    n: int,
    *,
    block: int = 100,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Mean distinct-n of disjoint blocks of ``block`` samples, with an interval over blocks.

    Prompts are shuffled (seeded) and their samples laid out one after the other, so a prompt's
    samples share a block, or two neighbouring ones. An incomplete last block is left out.
    Compare only numbers with the same block and the same samples per prompt. In the result, ``n``
    counts blocks and ``rows`` the samples in them; the value is None without a full block.
    """
    if block < 1:
        raise ValueError(f"block: at least one sample; got {block}")
    by_prompt = _by_prompt(texts, clusters)
    names = sorted(by_prompt)
    shuffled = np.random.default_rng(0).permutation(len(names))
    line = [text for i in shuffled for text in by_prompt[names[i]]]
    full = len(line) // block
    values = [distinct_n_words(line[i * block : (i + 1) * block], n) for i in range(full)]
    found = mean(values, [str(i) for i in range(full)], resamples=resamples)
    return Estimate(found.value, found.lo, found.hi, found.n, found.n * block)


def _by_prompt(texts: Sequence[str], clusters: Sequence[str]) -> dict[str, list[str]]:
    """Every prompt's texts, sorted, so results do not depend on the order of rows."""
    by_prompt: dict[str, list[str]] = {}
    for text, name in zip(texts, clusters, strict=True):
        by_prompt.setdefault(name, []).append(text)
    return {name: sorted(own) for name, own in by_prompt.items()}


def ngram_entropy(texts: Iterable[str], n: int) -> float | None:
    """Shannon entropy of the n-grams of all texts together, in nats (PHF); None without an n-gram.

    Words by whitespace, n-grams within a text. It grows with the number of texts, so it compares only sets of the
    same size.
    """
    counts = Counter[tuple[str, ...]]()
    for text in texts:
        words = text.split()
        counts.update(zip(*(words[i:] for i in range(n)), strict=False))
    total = counts.total()
    return -sum(k / total * math.log(k / total) for k in counts.values()) if total else None


def self_bleu(texts: Sequence[str], n: int = 5, references: int = 200) -> float | None:
    """Word-level Self-BLEU (Zhu et al., 2018, arXiv:1802.01886): the mean BLEU-n of each text against others.

    The others are the first ``references`` of the texts without the text itself; a count of 0 is smoothed to 0.1
    (without a word in common the BLEU is 0), as in PHF, whose released code compares characters by mistake. A text
    of fewer than n words is compared on as many orders as it has. From 0 to 1, higher is more alike; None with
    fewer than two texts.

    Raises:
        ImportError: the extra ``metrics`` is not installed.
    """
    from sacrebleu.metrics.bleu import BLEU

    if len(texts) < 2:
        return None
    bleu = BLEU(
        max_ngram_order=n, smooth_method="floor", smooth_value=0.1, tokenize="none", effective_order=True
    )
    first = texts[: references + 1]
    scores = []
    for i, text in enumerate(texts):
        others = [*first[:i], *first[i + 1 :]] if i < len(first) else first
        scores.append(float(bleu.sentence_score(text, others[:references]).score) / 100)
    return sum(scores) / len(scores)
