"""Commands that show what was computed: scores, states, times, tables."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from textalign_dagster.cli.command import library_of, open_console, open_store, print_json, readable
from textalign_dagster.experiment.files import Library, home
from textalign_dagster.settings import SettingsError

if TYPE_CHECKING:
    import polars as pl
    from rich.console import Console


@click.command()
@click.argument("experiment")
@click.option("--json", "as_json", is_flag=True, help="The numbers as JSON, all conditions and iterations.")
@readable
def show(experiment: str, as_json: bool) -> None:
    """Shows the score table with intervals, null control, guards, probes and baselines; saves the curves.

    \b
    Example:
      textalign show pep8_alt_lmu
    """
    library, name = library_of(experiment)
    if as_json:
        from textalign_dagster.reports.report import score_rows

        print_json(score_rows(open_store(), library, name).to_dicts())
    else:
        show_scores(library, name, open_console())


@click.command()
@click.argument("experiment", required=False)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--all", "everything", is_flag=True, help="Include experiments that have never been run.")
@readable
def status(experiment: str | None, as_json: bool, everything: bool) -> None:
    """Shows the state of each stage of each iteration (fresh, stale, blocked, missing), and the seconds it took.

    Lists the experiments that have been started.

    \b
    Examples:
      textalign status
      textalign status --all
      textalign status pep8_alt_lmu --json
    """
    from textalign_dagster.reports.status import grid, grid_table

    library, name = library_of(experiment) if experiment else (Library.default(), None)
    store = open_store()
    names = [name] if name else list(library.load_all()[0])
    if name is None and not everything:
        begun = set(store.cells()["experiment"])
        names = [one for one in names if one in begun]
        if not names and not as_json:
            click.echo("nothing has been run yet; `textalign status --all` lists all experiments")
            return
    cells = grid(store, library, names)
    if as_json:
        print_json(cells)
    else:
        open_console().print(grid_table(cells))


@click.command()
@click.argument("experiment")
@click.option("--json", "as_json", is_flag=True, help="As JSON: a row per iteration, stage and part.")
@readable
def timing(experiment: str, as_json: bool) -> None:
    """Shows where the time of each iteration went: seconds by stage and part, and what took longest.

    Counts only stages computed for this experiment, not Dagster's own time between them.

    \b
    Example:
      textalign timing pep8_alt_lmu
    """
    from textalign_dagster.reports.timing import timing_table, timings

    _, name = library_of(experiment)
    rows = timings(open_store(), name)
    if as_json:
        print_json(rows)
    else:
        open_console().print(timing_table(rows))


@click.command()
@click.argument("query", required=False)
@click.option("--json", "as_json", is_flag=True, help="Rows as JSON.")
@readable
def sql(query: str | None, as_json: bool) -> None:
    """Queries all tables with SQL (DuckDB); without QUERY, opens a prompt.

    \b
    Tables: prompt_draws, generations, feedback, datapool, checkpoints, scores, evaluation_samples;
    and ready-made joins: samples, costs, lineage. All have experiment and iteration.
    \b
    Examples:
      textalign sql "select iteration, label, count(*) from datapool where drawn group by all order by all"
      textalign sql "describe samples"
    """
    from textalign_dagster.cli.sql import answer, prompt

    if query is None:
        prompt(open_store())
    else:
        answer(open_store(), query, as_json)


@click.command()
@readable
def catalog() -> None:
    """Writes a read-only DuckDB file with all views, for the duckdb CLI and notebooks.

    \b
    Example:
      duckdb -readonly "$(textalign catalog)"
    """
    from resources.views import write_catalog

    click.echo(str(write_catalog(open_store())))


def show_scores(library: Library, name: str, console: Console) -> None:
    """Prints the score table and saves the curves."""
    from textalign_dagster.reports.curves import curves, save_curves
    from textalign_dagster.reports.report import score_rows, score_table

    rows: pl.DataFrame = score_rows(open_store(), library, name)
    if rows.is_empty():
        raise SettingsError(f"{name} has not been evaluated yet: textalign run {name}")
    experiment = library.load(name)
    console.print(score_table(rows, experiment, name, console.width))
    figure = curves(rows, experiment, name)
    path = save_curves(figure, home() / "plots" / f"{name}.png")
    console.print(f"curves: {path}", highlight=False, soft_wrap=True)


COMMANDS = (show, status, timing, sql, catalog)
