"""Commands for experiment files: list, write, check and explain them."""

from __future__ import annotations

import sys

import click

from textalign_dagster.cli.command import library_of, print_json, readable
from textalign_dagster.experiment.files import Library
from textalign_dagster.settings import describe


@click.command()
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


@click.command("show-config")
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


@click.command()
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


@click.command()
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


COMMANDS = (validate, show_config, new, experiments)
