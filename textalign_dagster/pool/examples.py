"""Turns drawn rows into examples: single rows, pairs and groups, all rows of one table.

Functions take the drawn rows of a pool with their samples: pool_hash, sample_id, prompt_id, value,
label, condition, weight, n_tokens, prompt, text, finish_reason, logprob, spans, beaten (ids of samples that it
was judged better than). They return rows of
:data:`textalign_dagster.tables.EXAMPLES`. The order of the rows affects only the order of the
result.
"""

from __future__ import annotations

import polars as pl

from textalign_dagster.ids import content_hash
from textalign_dagster.tables import EXAMPLES, conform


def single(rows: pl.DataFrame, role: str = "only") -> pl.DataFrame:
    """One example per row, in the order of the rows."""
    return _examples(rows.with_columns(role=pl.lit(role), group_id=pl.lit(None, dtype=pl.String)))


def pairs(rows: pl.DataFrame, *, per_prompt: int = 1, margin: float = 0.0) -> pl.DataFrame:
    """Preference pairs within a prompt: best with worst, second best with second worst, and so on.

    A pair needs two different texts and a difference of values above ``margin``, so equal values never
    form one. Its weight is the product of its samples' weights: a sample of weight 2 counts as if it
    occurred twice.
    """
    ranked = rows.filter(pl.col("value").is_not_null() & pl.col("value").is_not_nan()).sort(
        "prompt_id", "value", "sample_id", descending=[False, True, False]
    )
    ranked = ranked.with_columns(
        best=pl.int_range(pl.len()).over("prompt_id"),
        worst=pl.int_range(pl.len()).reverse().over("prompt_id"),
    )
    chosen = ranked.filter(pl.col("best") < pl.min_horizontal(pl.col("worst"), per_prompt))
    pair = (
        chosen.join(
            ranked.select("prompt_id", best="worst", other="sample_id", other_value="value",
                          other_text="text", other_weight="weight"),
            on=["prompt_id", "best"],
        )
        .filter(
            (pl.col("value") - pl.col("other_value") > margin) & (pl.col("text") != pl.col("other_text"))
        )
    )  # fmt: skip
    return _sides(rows, pair)


def _sides(rows: pl.DataFrame, pair: pl.DataFrame) -> pl.DataFrame:
    """The two examples of each pair.

    Args:
        pair: prompt_id, best (the order within a prompt), sample_id and other (the rejected one), weight and
            other_weight.
    """
    pair = pair.with_columns(
        group_id=_hashes(pl.struct("sample_id", "other"), "pair"),
        pair_weight=pl.col("weight") * pl.col("other_weight"),
    )
    sides = pl.concat(
        [
            pair.select("prompt_id", "best", "group_id", "pair_weight", "sample_id", role=pl.lit("chosen")),
            pair.select(
                "prompt_id", "best", "group_id", "pair_weight", sample_id="other", role=pl.lit("rejected")
            ),
        ]
    ).sort("prompt_id", "best", "role")
    joined = sides.drop("prompt_id").join(rows, on="sample_id", how="left", maintain_order="left")
    return _examples(joined.with_columns(weight="pair_weight"))


def compared(rows: pl.DataFrame) -> pl.DataFrame:
    """Preference pairs as they were compared: each sample with every sample it was judged better than.

    Both must be among the rows. Weights are as in :func:`pairs`.
    """
    other = rows.select(beaten="sample_id", other_text="text", other_weight="weight")
    found = (
        rows.select("sample_id", "prompt_id", "text", "weight", "beaten")
        .explode("beaten", empty_as_null=True)
        .join(other, on="beaten")
        .filter(pl.col("text") != pl.col("other_text"))
        .sort("prompt_id", "sample_id", "beaten")
        .with_row_index("best")
    )
    return _sides(rows, found.rename({"beaten": "other"}))


def groups(rows: pl.DataFrame) -> pl.DataFrame:
    """All samples of a prompt as members of one group; prompts sorted by id."""
    ordered = rows.sort("prompt_id", "sample_id")
    return _examples(ordered.with_columns(role=pl.lit("member"), group_id="prompt_id"))


def mismatched(examples: pl.DataFrame) -> pl.DataFrame:
    """The examples with a ``second_prompt`` that their text does not belong to: the prompt of another example.

    With examples sorted by id, each gets the prompt of the next one that has another prompt, wrapping
    around at the end.

    Raises:
        ValueError: all have the same prompt.
    """
    drawn = examples.sort("example_id")
    prompts = drawn["prompt"].to_list()
    if len(set(prompts)) < 2:
        if not prompts:
            return examples
        raise ValueError(
            "all drawn samples have the same prompt, but each text must also be paired with another one; "
            "raise prompts.per_iteration"
        )
    others: list[str] = []
    following = next(prompt for prompt in prompts if prompt != prompts[-1])
    for at in range(len(prompts) - 1, -1, -1):
        after = prompts[(at + 1) % len(prompts)]
        following = after if after != prompts[at] else following
        others.append(following)
    other = drawn.select("example_id", second_prompt=pl.Series(others[::-1]))
    return (
        examples.drop("second_prompt")
        .join(other, on="example_id", maintain_order="left")
        .select(EXAMPLES.names())
    )


def _examples(rows: pl.DataFrame) -> pl.DataFrame:
    named = pl.struct("sample_id", "role", "group_id", "condition")
    return conform(
        rows.select(
            "pool_hash",
            "sample_id",
            "role",
            "group_id",
            "prompt",
            "condition",
            "text",
            "finish_reason",
            "n_tokens",
            "weight",
            "spans",
            example_id=_hashes(named, "example"),
            second_prompt=pl.lit(None, dtype=pl.String),
            reward="value",
            sampled_logprob="logprob",
        ),
        EXAMPLES,
        "examples",
    )


def _hashes(columns: pl.Expr, kind: str) -> pl.Expr:
    """A content hash of the values of each row."""

    def one(values: dict[str, str | None]) -> str:
        return content_hash(kind, *values.values())

    return columns.map_elements(one, return_dtype=pl.String)
