"""The command line, ``textalign``: running experiments and checking the machine; other groups have modules of their own."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from datetime import UTC, datetime

import click

from textalign_dagster import __version__
from textalign_dagster.cli import comparing, experiments, feedback, results
from textalign_dagster.cli.cleaning import clean
from textalign_dagster.cli.command import Refused, library_of, open_console, open_store, print_json, readable
from textalign_dagster.cli.results import show_scores
from textalign_dagster.experiment.files import Library, home, variants_folder
from textalign_dagster.settings import SettingsError

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
    show_scores(library, name, console)


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


for command in (
    *experiments.COMMANDS,
    *results.COMMANDS,
    *feedback.COMMANDS,
    *comparing.COMMANDS,
    clean,
):
    main.add_command(command)

if __name__ == "__main__":
    main()
