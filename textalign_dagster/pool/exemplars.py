"""Varied exemplars: each prompt is conditioned on a feedback text that good samples received earlier.

The published runs of ALT_LMU used such prompt files ("varied feedbacks"), made by hand. Here the draw is a
pure function of a datapool and a seed, so it is reproducible, and it is stored with every sample.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from textalign_dagster.ids import content_hash, derive_seed

DROPPED = "dropped: earlier iteration"
"""The reason (one of :data:`textalign_dagster.pool.draw.REASONS`) of rows that have left the pool."""


class NoExemplarError(ValueError):
    """The best bucket of a datapool has no text to condition on; the message gives the remedy."""


def candidates(pool: pl.DataFrame, best: str) -> list[str]:
    """The distinct conditions in a pool's best bucket, in an order that depends only on the texts.

    Samples that are not drawn count too; those that have left the pool, and blank texts, do not.

    Args:
        pool: label, condition, reason (columns of DATAPOOL).
        best: the label of the best bucket.
    """
    inside = (pl.col("label") == best) & (pl.col("reason") != DROPPED)
    texts = pool.filter(inside & (pl.col("condition").str.strip_chars() != ""))["condition"].unique()
    return sorted(texts, key=lambda text: content_hash("exemplar", text))


def varied_exemplars(
    pool: pl.DataFrame, best: str, prompt_ids: Sequence[str], *, seed: int, iteration: int
) -> list[str]:
    """The condition of each prompt: one of :func:`candidates`, drawn by (seed, iteration, prompt).

    Raises:
        NoExemplarError: there are no candidates.
    """
    texts = candidates(pool, best)
    if not texts:
        raise NoExemplarError(
            f"no sample in the datapool is in the best bucket ({best!r}) with a text to condition on, so `exemplar: "
            "varied` has nothing to draw from; sample more (prompts.per_iteration, "
            "sampling.samples_per_prompt), or set `exemplar: static` and the text (`ask_for`)"
        )
    return [texts[derive_seed(seed, "exemplar", iteration, prompt) % len(texts)] for prompt in prompt_ids]
