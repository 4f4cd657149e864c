"""The commands about feedback: what it will take, other projects' files in and out, how consistent it is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from textalign_dagster.command import library_of, open_store, print_json, readable
from textalign_dagster.settings import SettingsError

if TYPE_CHECKING:
    from textalign_dagster.judging.agreement import Agreement
    from textalign_dagster.statistics import Estimate

FORMATS = ("alt", "cut", "sparse_ratings", "sparse_rankings", "plain")
HELD = tuple(name for name in FORMATS if name != "sparse_rankings")  # the loop ranks no pairs yet
FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("experiment")
@click.option(
    "--iteration", "-k", type=click.IntRange(min=1), default=1, show_default=True, help="Which iteration."
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@readable
def forecast(experiment: str, iteration: int, as_json: bool) -> None:
    """What judging an iteration will take: calls, tokens, money, time, and what is paid already.

    Calls nobody. Exact in calls once the iteration's samples exist; an upper bound before.

    \b
    Example:
      textalign forecast my_experiment --iteration 2
    """
    from textalign_dagster.forecasting import forecast_iteration

    library, name = library_of(experiment)
    found = forecast_iteration(open_store(), name, library.load(name), iteration)
    if as_json:
        print_json(found)
        return
    bound = "" if found["samples_exist"] else " at most (the samples do not exist yet)"
    click.echo(
        f"{name}, iteration {iteration}: {found['calls']:,} calls{bound}, {found['cached']:,} paid already"
    )
    click.echo(f"tokens in: about {found['tokens_in']:,}, at most {found['tokens_in_max']:,}")
    for title, key, unit in (
        ("tokens out, at most", "tokens_out_max", ""),
        ("tokens out, expected", "tokens_out_expected", ""),
        ("USD, at most", "usd_max", ""),
        ("USD, expected", "usd_expected", ""),
        ("seconds", "seconds", ""),
    ):
        value = found[key]
        click.echo(f"{title}: {'not known' if value is None else f'{value:,.4g}{unit}'}")


@click.command("export")
@click.argument("experiment")
@click.argument("path", type=FILE)
@click.option("--iteration", "-k", type=click.IntRange(min=1), required=True, help="Which iteration.")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(HELD),
    metavar="FORMAT",
    default="plain",
    show_default=True,
    help="alt, cut, sparse_ratings or plain.",
)
@readable
def export_feedback(experiment: str, path: Path, iteration: int, format_name: str) -> None:
    """Writes an iteration's samples and feedback to PATH, in another project's format.

    alt: ALT's JSON Lines; cut: CUT's and Alpaca's JSON; sparse_ratings: the CSV of sparse_feedback; plain: one
    judgement a row, .jsonl or .parquet. Says what the format cannot hold.

    \b
    Example:
      textalign export pep8_alt_lmu feedback.jsonl --iteration 1 --format alt
    """
    from textalign_dagster.judging.convert import write_feedback

    library, name = library_of(experiment)
    library.load(name)
    store = open_store()
    generations = store.pointer(name, iteration, "generations")
    feedback = store.pointer(name, iteration, "feedback")
    if generations is None or feedback is None:
        raise SettingsError(f"{name}, iteration {iteration}, has no feedback yet: textalign run {name}")
    samples = generations.artifact.frame("generations").select("sample_id", "prompt_id", "prompt", "text")
    try:
        done = write_feedback(path, format_name, samples, feedback.artifact.frame("feedback"))
    except ValueError as error:
        raise SettingsError(f"--format {format_name}: {error}") from None
    click.echo(done.summary())


@click.command("import")
@click.argument("path", type=FILE)
@click.argument("target", type=FILE)
@click.option(
    "--format",
    "format_name",
    type=click.Choice(FORMATS),
    metavar="FORMAT",
    required=True,
    help="alt, cut, sparse_ratings, sparse_rankings or plain.",
)
@click.option("--skip-refused", is_flag=True, help="Write the good rows although others are refused.")
@readable
def import_feedback(path: Path, target: Path, format_name: str, skip_refused: bool) -> None:
    """Reads feedback collected elsewhere from PATH, checks it, and writes it to TARGET in the plain format.

    TARGET ends in .jsonl or .parquet: one judgement a row. Rows that cannot be read are told with line, reason
    and example, and stop the import.

    \b
    Example:
      textalign import ratings.csv ratings.parquet --format sparse_ratings
    """
    from textalign_dagster.judging.convert import read_feedback, write_feedback

    found = read_feedback(path, format_name)
    click.echo(found.summary())
    if found.refused and not skip_refused:
        raise SettingsError(
            f"{path}: {len(found.refused)} of {found.rows} rows are refused and nothing was written; mend them, or "
            "give --skip-refused"
        )
    click.echo(write_feedback(target, "plain", found.samples, found.feedback, found.pairs).summary())


@click.command()
@click.argument("ratings", type=FILE)
@click.argument("rankings", type=FILE)
@click.option(
    "--ratings-format",
    type=click.Choice(FORMATS),
    metavar="FORMAT",
    default="plain",
    help="Of RATINGS; as in import.",
)
@click.option(
    "--rankings-format",
    type=click.Choice(FORMATS),
    metavar="FORMAT",
    default="plain",
    help="Of RANKINGS; as in import.",
)
@click.option("--margin", type=float, default=0.0, show_default=True, help="Ratings this close tie.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@readable
def consistency(
    ratings: Path, rankings: Path, ratings_format: str, rankings_format: str, margin: float, as_json: bool
) -> None:
    """Compares ratings with rankings of the same samples, matched by id.

    Shows the 3×3 matrix, agreement, agreement where both decide, Cohen's kappa, coverage and what the order of
    showing does, with 95 % intervals from resampling prompts.

    \b
    Example:
      textalign consistency ratings.csv rankings.csv --ratings-format sparse_ratings --rankings-format sparse_rankings
    """
    from textalign_dagster.judging.consistency import consistency as compare
    from textalign_dagster.judging.convert import read_feedback

    rated, ranked = read_feedback(ratings, ratings_format), read_feedback(rankings, rankings_format)
    if ranked.pairs.is_empty():
        raise SettingsError(f"{rankings}: holds no rankings of pairs; give a file of them second")
    try:
        report = compare(rated.feedback, ranked.pairs, margin=margin)
    except ValueError as error:
        raise SettingsError(f"{ratings}, {rankings}: {error}") from None
    if as_json:
        print_json(asdict(report))
        return
    for path, found in ((ratings, rated), (rankings, ranked)):
        click.echo(f"{path}: {found.summary()}")
    _print_agreement(report.agreement)
    coverage = report.coverage
    click.echo(
        f"pairs: {coverage.pairs:,}, ranked {coverage.ranked:,}, rated {coverage.rated:,}, both {coverage.both:,}"
    )
    click.echo(f"calls won by the response shown first: {_told(report.position.first_wins)}")
    click.echo(f"pairs in which the same place won twice: {_told(report.position.flips)}")


def _print_agreement(found: Agreement) -> None:
    classes = ("first better", "tie", "second better")
    click.echo(f"\n{'ratings say':<16}{'rankings say':>14}")
    click.echo(f"{'':<16}" + "".join(f"{name:>14}" for name in classes))
    for name, row in zip(classes, found.matrix, strict=True):
        click.echo(f"{name:<16}" + "".join(f"{count:>14,}" for count in row))
    click.echo(f"\nagreement: {_told(found.agreement)}")
    click.echo(f"agreement where both decide: {_told(found.decisive)}")
    click.echo(f"Cohen's kappa: {_told(found.kappa)}")


def _told(found: Estimate) -> str:
    if found.value is None:
        return "undefined"
    interval = "" if found.lo is None or found.hi is None else f" ({found.lo:.3f} to {found.hi:.3f})"
    return f"{found.value:.3f}{interval}, n = {found.rows:,}"


COMMANDS = (forecast, export_feedback, import_feedback, consistency)
