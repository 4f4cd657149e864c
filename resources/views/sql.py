"""The SQL of the views."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import polars as pl

from textalign_dagster.tables import MEASURES

SIMPLE_TYPES: dict[pl.DataType, str] = {
    pl.String(): "VARCHAR",
    pl.Boolean(): "BOOLEAN",
    pl.Int32(): "INTEGER",
    pl.Int64(): "BIGINT",
    pl.Float64(): "DOUBLE",
}

SAMPLES = """
CREATE VIEW samples AS
WITH judged AS (
    SELECT experiment, iteration, sample_id,
        list({aspect: aspect, kind: kind, value: value, label: label, text: text, status: status,
              reason: reason} ORDER BY aspect) AS feedback
    FROM feedback
    GROUP BY ALL
)
SELECT g.experiment, g.iteration, g.sample_id, g.draw_id, g.prompt_id, g.prompt, g.condition,
    g.text, g.n_tokens, g.finish_reason,
    j.feedback[1].aspect AS feedback_aspect,
    j.feedback[1].kind AS feedback_kind,
    j.feedback[1].value AS feedback_value,
    j.feedback[1].label AS feedback_label,
    j.feedback[1].text AS feedback_text,
    j.feedback[1].status AS feedback_status,
    j.feedback[1].reason AS feedback_reason,
    j.feedback AS feedback,
    p.label AS pool_label, p.drawn AS pool_drawn, p.reason AS pool_reason
FROM generations g
LEFT JOIN judged j USING (experiment, iteration, sample_id)
LEFT JOIN datapool p USING (experiment, iteration, sample_id)
"""
"""``feedback`` lists all aspects of a sample, sorted by name; ``feedback_*`` are those of the first."""

PREFERENCE_BATCHES = """
CREATE VIEW preference_batches AS
SELECT a.experiment, a.iteration, a.example_id, a.prompt,
    a.prompt || a.text AS generation1,
    a.text AS generation1_response_only,
    CASE WHEN a.role = 'chosen' THEN if(a.reward IS NULL, NULL, 1.0) ELSE a.reward END AS generation1_reward,
    a.weight AS generation1_weight,
    b.prompt || b.text AS generation2,
    b.text AS generation2_response_only,
    if(b.reward IS NULL, NULL, 0.0) AS generation2_reward,
    b.weight AS generation2_weight
FROM examples a
LEFT JOIN examples b
    ON a.role = 'chosen' AND b.role = 'rejected' AND a.group_id = b.group_id
    AND a.experiment = b.experiment AND a.iteration = b.iteration
WHERE a.role <> 'rejected'
"""
"""The examples in the schema of Alignment_with_Huggingface's batches: single rows and members of groups have one
generation with its reward; a pair has two, with rewards 1 and 0 where rewards ordered it and NULL elsewhere."""

COSTS = """
CREATE VIEW costs AS
SELECT c.experiment, c.iteration, c.stage, m.seconds, m.gpu_seconds, m.usd,
    row_number() OVER (
        PARTITION BY c.stage, c.key ORDER BY c.reused, c.assigned_at, c.experiment, c.iteration
    ) > 1 AS reused,
    m.created_at, c.key
FROM cells c JOIN manifests m USING (stage, key)
"""
"""Of the cells that share an artifact, exactly one is not ``reused``, so sums are correct."""

LINEAGE = """
CREATE VIEW lineage AS
SELECT policy_hash, parent, reference, pool_hash, experiment, iteration FROM checkpoints
"""


def ledger_source(paths: Iterable[str], recent: str) -> str:
    """A query for all rows of the ledger: its Parquet files, and the table ``recent``."""
    listed = ", ".join(literal(path) for path in paths)
    files = f" UNION ALL BY NAME FROM read_parquet([{listed}], union_by_name = true)" if listed else ""
    return f"FROM {quoted(recent)}{files}"


def ledger_doubles(source: str) -> str:
    """A query for whether any call may be in ``source`` twice: seconds cheaper than always deduplicating."""
    return f"SELECT count(*) <> count(DISTINCT hash(call_key, called_at)) FROM ({source})"


def ledger_view(source: str, ranks: Mapping[str, int] | None) -> str:
    """``CREATE VIEW feedback_calls``. With ``ranks``, only each call's row with the lowest-ranked status."""
    once = ""
    if ranks is not None:
        cases = " ".join(f"WHEN {literal(status)} THEN {number}" for status, number in ranks.items())
        once = (
            " QUALIFY row_number() OVER (PARTITION BY call_key, called_at "
            f"ORDER BY CASE status {cases} ELSE 0 END, attempts DESC) = 1"
        )
    return f"CREATE VIEW feedback_calls AS SELECT * FROM ({source}){once}"


def duckdb_type(dtype: pl.DataType) -> str:
    """The DuckDB type as which a Parquet column of this polars type is read."""
    if isinstance(dtype, pl.List):
        return f"{duckdb_type(_instance(dtype.inner))}[]"
    if isinstance(dtype, pl.Struct):
        fields = (f"{quoted(f.name)} {duckdb_type(_instance(f.dtype))}" for f in dtype.fields)
        return f"STRUCT({', '.join(fields)})"
    return SIMPLE_TYPES[dtype]


def quoted(name: str) -> str:
    """An SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def literal(text: str) -> str:
    """An SQL string."""
    return "'" + text.replace("'", "''") + "'"


def table_view(
    table: str,
    schema: pl.Schema | None,
    paths: Iterable[str],
    columns: Sequence[tuple[str, ...]],
) -> str:
    """``CREATE VIEW`` of one table over its files, joined with the cells that point at each.

    With a schema the view has exactly its columns and types; columns that older files lack are NULL.
    Without one it has all the files' columns. ``columns`` are those of each file: files with the same
    columns need not all be opened before a query.
    """
    listed = ", ".join(literal(path) for path in paths)
    present = {column for file in columns for column in file}
    if schema is None:
        wanted = "t.* EXCLUDE (filename)"
    else:
        wanted = ", ".join(_column(name, _instance(dtype), name in present) for name, dtype in schema.items())
    if not listed:
        return (
            f"CREATE VIEW {quoted(table)} AS SELECT NULL::VARCHAR AS experiment, "
            f"NULL::INTEGER AS iteration, {wanted} WHERE false"
        )
    by_name = str(len(set(columns)) > 1).lower()
    return (
        f"CREATE VIEW {quoted(table)} AS SELECT f.experiment, f.iteration, {wanted} "
        f"FROM read_parquet([{listed}], filename = true, hive_partitioning = false, "
        f"union_by_name = {by_name}) t "
        f"JOIN files f ON f.path = t.filename AND f.table_name = {literal(table)}"
    )


def _column(name: str, dtype: pl.DataType, present: bool) -> str:
    measures = dtype == MEASURES
    kind = "MAP(VARCHAR, DOUBLE)" if measures else duckdb_type(dtype)
    if not present:
        return f"NULL::{kind} AS {quoted(name)}"
    source = f"t.{quoted(name)}"
    if measures:
        source = f"map_from_entries({source})"
    return f"{source}::{kind} AS {quoted(name)}"


def _instance(dtype: object) -> pl.DataType:
    """Polars accepts types and their instances alike; this returns an instance."""
    instance = dtype() if isinstance(dtype, type) else dtype
    assert isinstance(instance, pl.DataType)
    return instance
