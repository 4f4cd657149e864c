"""Weights of prompts or samples, from a query over the tables."""

import polars as pl

from resources.store import ArtifactStore
from textalign_dagster.settings import SettingsError


def queried_weights(store: ArtifactStore, query: str, field: str, key: str) -> dict[str, float]:
    """Key → weight.

    Args:
        field: the setting that holds the query, for errors.
        key: the column in addition to ``weight``: prompt_id or sample_id.

    Raises:
        SettingsError: the query fails, or returns something else.
    """
    import duckdb  # only weights need it

    from resources.views import connect

    with connect(store) as database:
        try:
            answer: duckdb.DuckDBPyRelation | None = database.sql(query)
            if answer is None:
                raise SettingsError(f"{field}: the query gives no rows; it must select {key}, weight")
            frame = answer.pl()
        except duckdb.Error as error:
            raise SettingsError(f"{field}: the query fails: {error}") from None
    if not {key, "weight"} <= set(frame.columns):
        raise SettingsError(
            f"{field}: the query gives {', '.join(frame.columns)}; it must give {key}, weight"
        )
    kinds = frame.schema[key], frame.schema["weight"]
    if kinds[0] != pl.String or not kinds[1].is_numeric():
        raise SettingsError(
            f"{field}: {key} is {kinds[0]} and weight is {kinds[1]}; they must be text and a number"
        )
    rows = frame.select(key, pl.col("weight").cast(pl.Float64)).drop_nulls()
    if rows[key].is_duplicated().any():
        raise SettingsError(f"{field}: the query gives a {key} more than once; group by it")
    return dict(rows.iter_rows())
