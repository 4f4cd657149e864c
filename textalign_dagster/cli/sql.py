"""``textalign sql``: one query, or an interactive prompt."""

from __future__ import annotations

import sys

import click
import duckdb

from resources.store import ArtifactStore
from resources.views import connect
from textalign_dagster.cli.command import print_json
from textalign_dagster.settings import SettingsError


def answer(store: ArtifactStore, query: str, as_json: bool = False) -> None:
    """Prints a query's result.

    Raises:
        SettingsError: the query fails; the message is DuckDB's.
    """
    with connect(store) as database:
        try:
            _print(database, query, as_json)
        except duckdb.Error as error:
            raise SettingsError(str(error)) from None


def prompt(store: ArtifactStore) -> None:
    """Reads queries, each ended by a semicolon or an empty line, until the input ends."""
    import readline  # noqa: F401  (gives input() line editing and history)

    with connect(store) as database:
        if sys.stdin.isatty():
            click.echo("All tables in SQL; `show tables;` lists them. Ctrl-D exits.")
        lines: list[str] = []
        while True:
            try:
                line = input(("...> " if lines else "sql> ") if sys.stdin.isatty() else "")
            except KeyboardInterrupt:
                lines = []
                click.echo()
                continue
            except EOFError:
                line, ended = "", True
            else:
                ended = False
            lines.append(line)
            if ended or not line.strip() or line.rstrip().endswith(";"):
                query, lines = "\n".join(lines).strip(), []
                if query:
                    try:
                        _print(database, query, as_json=False)
                    except duckdb.Error as error:
                        click.echo(f"error: {error}", err=True)
            if ended:
                return


def _print(database: duckdb.DuckDBPyConnection, query: str, as_json: bool) -> None:
    relation: duckdb.DuckDBPyRelation | None = database.sql(query)
    if relation is None:  # statements without a result, such as SET
        return
    if as_json:
        print_json(relation.pl().to_dicts())
    else:
        # Piped output may be wide; on a terminal, DuckDB fits its width.
        if sys.stdout.isatty():
            relation.show(max_rows=200)
        else:
            relation.show(max_rows=200, max_width=10_000)
