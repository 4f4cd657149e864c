"""distinct-n as measures of a task, by the published definitions (see :mod:`textalign_dagster.measures.diversity`)."""

from __future__ import annotations

import polars as pl

from textalign_dagster.measures.diversity import distinct_n_words
from textalign_dagster.tasks.base import Measure

ORDERS = (1, 2, 3)


def pooled_measures() -> tuple[Measure, ...]:
    """dist-1/2/3 over all texts at once: no intervals, because resampling prompts repeats texts and biases it."""
    return tuple(Measure(f"dist_{n}_pooled", f"dist-{n} over all", f"dist_{n}_pooled") for n in ORDERS)


def per_prompt_measures() -> tuple[Measure, ...]:
    """dist-1/2/3 of each prompt's own samples, then the mean over prompts."""
    return tuple(Measure(f"dist_{n}", f"dist-{n} per prompt", f"dist_{n}") for n in ORDERS)


def pooled(samples: pl.DataFrame) -> pl.DataFrame:
    """The columns of :func:`pooled_measures`: the number on the first sample of a policy, else NULL."""
    return _first_of(samples, _whose(samples), "dist_{n}_pooled")


def per_prompt(samples: pl.DataFrame) -> pl.DataFrame:
    """The columns of :func:`per_prompt_measures`: the number on a prompt's first sample, else NULL."""
    return _first_of(samples, [*_whose(samples), "prompt_id"], "dist_{n}")


def _whose(samples: pl.DataFrame) -> list[str]:
    return [column for column in ("role", "subject") if column in samples.columns]


def _first_of(samples: pl.DataFrame, group: list[str], name: str) -> pl.DataFrame:
    """sample_id and one column for each n; samples under other conditions (probes) are left out."""
    counted = samples.filter(pl.col("role") != "probe").group_by(*group, maintain_order=True)
    numbers = counted.agg(pl.col("sample_id").first(), pl.col("text")).select("sample_id", "text")
    columns = [
        pl.Series(
            name.format(n=n), [distinct_n_words(texts, n) for texts in numbers["text"]], dtype=pl.Float64
        )
        for n in ORDERS
    ]
    found = numbers.select("sample_id", *columns)
    return samples.select("sample_id").join(found, on="sample_id", how="left", maintain_order="left")
