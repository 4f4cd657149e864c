"""The command line, ``textalign``."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from textalign_dagster import __version__
from textalign_dagster.cli import comparing, feedback
from textalign_dagster.cli.cleaning import clean
from textalign_dagster.cli.command import Refused, library_of, open_console, open_store, print_json, readable
from textalign_dagster.experiment.files import Library, home, variants_folder
from textalign_dagster.settings import SettingsError, describe

if TYPE_CHECKING:
    import polars as pl
    from rich.console import Console


# Heavy modules (dagster, polars, duckdb) are imported by the commands that use them, so that --help is fast.


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="textalign")
def main() -> None:
    """Aligns language models from textual feedback, iteration by iteration.

    EXPERIMENT is a name from `textalign experiments`, or the path of an experiment file.
    """


@main.command()
@click.argument("experiment")
@click.option("--iterations", "-k", type=click.IntRange(min=1), help="Run iterations 1 … K (default: all).")
@click.option(
    "--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Override a field; repeatable."
)
@click.option("--control/--no-control", default=True, help="Also run the null control (default: yes).")
@click.option("--retry-failed", is_flag=True, help="Retry judge calls that were given up in earlier runs.")
@readable
def run(
    experiment: str, iterations: int | None, overrides: tuple[str, ...], control: bool, retry_failed: bool
) -> None:
    """Runs the missing iterations in order, then shows the score table and the curves.

    Finished, up-to-date stages are reused; after an interruption, the same command resumes. --set
    creates a separate experiment, named after the overrides.

    \b
    Examples:
      textalign run pep8_alt_lmu
      textalign run pep8_alt_rm --iterations 1
      textalign run pep8_alt_lmu --set sampling.temperature=0.8 --set seed=1
    """
    from textalign_dagster.cli.preflight import preflight, writable
    from textalign_dagster.cli.space import check_space

    library, name = library_of(experiment)
    if name in library.templates and not overrides:
        raise SettingsError(
            f"{name} is a template; `textalign new my_{name} --from {name}` creates an experiment from it"
        )
    last = library.overridden(name, overrides).iterations
    if iterations is not None and iterations > last:
        raise SettingsError(
            f"--iterations {iterations}: {library.path(name)} has `iterations: {last}`; raise it there"
        )
    preflight(library, name, overrides)
    writable(home())
    name = library.variant(name, overrides, variants_folder())
    library = Library(library.folders)  # reads the folders again: the variant is new
    null_control = library.control_of(name)
    names = [name, *([null_control] if null_control and control else [])]
    store, console = open_store(), open_console()
    since = datetime.now(UTC) if retry_failed else None
    check_space(library, names, iterations, store)
    _use(library)
    # Imported only now: the grid is built from the experiments known at import, and the variant is new.
    from textalign_dagster.cli.running import RunFailed, Runner, dagster_instance

    with dagster_instance() as instance:
        try:
            Runner(instance, store, library, console, since).run(names, iterations)
        except RunFailed as error:
            raise Refused(
                f"{error}\nFinished stages are kept; the same command resumes from there."
            ) from None
        except KeyboardInterrupt:
            click.echo("stopped; finished stages are kept, the same command resumes from there", err=True)
            sys.exit(130)
    _show(library, name, console)


@main.command()
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
        _show(library, name, open_console())


@main.command()
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


@main.command()
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


@main.command()
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


@main.command()
@readable
def catalog() -> None:
    """Writes a read-only DuckDB file with all views, for the duckdb CLI and notebooks.

    \b
    Example:
      duckdb -readonly "$(textalign catalog)"
    """
    from resources.views import write_catalog

    click.echo(str(write_catalog(open_store())))


@main.command()
@click.argument("experiment")
@click.option("--set", "overrides", multiple=True, metavar="FIELD=VALUE", help="Try an override.")
@readable
def validate(experiment: str, overrides: tuple[str, ...]) -> None:
    """Checks an experiment before anything costly: fields, prompts, base policy, null control.

    \b
    Example:
      textalign validate experiments/my_experiment.yaml
    """
    from textalign_dagster.cli.preflight import preflight

    library, name = library_of(experiment)
    for line in preflight(library, name, overrides):
        click.echo(line)


@main.command("show-config")
@click.argument("experiment")
@click.option("--json", "as_json", is_flag=True, help="As JSON, without the explanations.")
@readable
def show_config(experiment: str, as_json: bool) -> None:
    """Shows all settings of an experiment, including defaults, each with its meaning.

    \b
    Example:
      textalign show-config pep8_alt_lmu
    """
    library, name = library_of(experiment)
    loaded = library.load(name)
    click.echo(loaded.model_dump_json(indent=2) if as_json else describe(loaded))


@main.command()
@click.argument("name")
@click.option(
    "--from",
    "template",
    default="pep8_alt_lmu",
    show_default=True,
    metavar="TEMPLATE",
    help="A template or an experiment; `textalign experiments --templates` lists the templates.",
)
@readable
def new(name: str, template: str) -> None:
    """Writes an experiment file of your own, with the meaning of each setting, and its null control.

    \b
    Examples:
      textalign new mine
      textalign new my_tldr --from tldr_alt_rm
    """
    for path in Library.default().adopt(name, template):
        click.echo(f"written: {path}")
    click.echo(f"next: edit it, then `textalign validate {name}` and `textalign run {name}`")


@main.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@click.option("--templates", is_flag=True, help="List the templates for `textalign new` instead.")
@readable
def experiments(as_json: bool, templates: bool) -> None:
    """Lists the experiments, and files that cannot be read, with the reason.

    \b
    Examples:
      textalign experiments
      textalign experiments --templates
    """
    library = Library.default()
    good, bad = library.load_all()
    if templates:
        good, bad = {name: library.load(name) for name in library.templates}, {}
    rows = [
        {"name": name, "description": found.description, "file": str(library.path(name))}
        for name, found in good.items()
    ]
    if as_json:
        print_json(rows)
    else:
        for row in rows:
            click.echo(f"{row['name']:<24} {row['description']}")
    for message in bad.values():
        click.echo(f"error: {message}", err=True)
    if bad:
        sys.exit(1)


@main.command()
@click.argument("experiment", required=False)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@readable
def doctor(experiment: str | None, as_json: bool) -> None:
    """Checks what this machine can do, what is missing, and what to install; makes no paid call.

    With EXPERIMENT, checks only the judges of that experiment. Exit code 1 if something will fail.

    \b
    Examples:
      textalign doctor
      textalign doctor pep8_alt_lmu --json
    """
    from textalign_dagster.cli.doctor import examine

    if experiment:
        library, name = library_of(experiment)
        examined = {name: library.load(name)}
    else:
        examined = Library.default().load_all()[0]
    findings = []
    marks = {"ok": "ok     ", "missing": "missing", "problem": "PROBLEM"}
    for finding in examine(examined):
        findings.append(finding)
        if not as_json:
            click.echo(f"{marks[finding.state]}  {finding.subject}: {finding.detail}")
            if finding.remedy:
                click.echo(f"         → {finding.remedy}")
    if as_json:
        print_json([asdict(finding) for finding in findings])
    if any(finding.state == "problem" for finding in findings):
        sys.exit(1)


def _use(library: Library) -> None:
    """Makes the folder of an experiment given as a path visible to the code location."""
    os.environ["TEXTALIGN_EXPERIMENTS"] = os.pathsep.join(
        str(folder) for folder in library.folders if folder != variants_folder()
    )


def _show(library: Library, name: str, console: Console) -> None:
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


for command in (*feedback.COMMANDS, *comparing.COMMANDS, clean):
    main.add_command(command)

if __name__ == "__main__":
    main()
