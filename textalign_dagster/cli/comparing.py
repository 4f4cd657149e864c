"""The commands that compare judgements: ratings with rankings, models with a reference."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from textalign_dagster.cli.command import library_of, open_store, print_json, readable
from textalign_dagster.cli.feedback import ALPACA_EVAL, FILE, FORMATS, READ_ONLY
from textalign_dagster.settings import SettingsError

if TYPE_CHECKING:
    from textalign_dagster.feedback_files.agreement import Agreement
    from textalign_dagster.feedback_files.imported import Imported
    from textalign_dagster.feedback_files.win_rates import Outcomes
    from textalign_dagster.measures.statistics import Estimate


@click.command()
@click.argument("ratings")
@click.argument("rankings")
@click.option(
    "--ratings-format",
    type=click.Choice((*FORMATS, *READ_ONLY)),
    metavar="FORMAT",
    default="plain",
    help="Format of the file RATINGS, as in import.",
)
@click.option(
    "--rankings-format",
    type=click.Choice((*FORMATS, *READ_ONLY)),
    metavar="FORMAT",
    default="plain",
    help="Format of the file RANKINGS, as in import.",
)
@click.option("--ratings-again", type=FILE, help="Ratings by the same judge, asked again.")
@click.option("--rankings-again", type=FILE, help="Rankings by the same judge, asked again.")
@click.option(
    "--iteration",
    "-k",
    type=click.IntRange(min=1),
    help="RATINGS and RANKINGS are experiments; compare this iteration.",
)
@click.option(
    "--margin",
    type=float,
    default=0.0,
    show_default=True,
    help="Ratings that differ by at most this count as a tie.",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@readable
def consistency(
    ratings: str,
    rankings: str,
    ratings_format: str,
    rankings_format: str,
    ratings_again: Path | None,
    rankings_again: Path | None,
    iteration: int | None,
    margin: float,
    as_json: bool,
) -> None:
    """Compares ratings with rankings of the same samples, matched by id.

    RATINGS and RANKINGS are files, or with --iteration two experiments whose judges saw the same samples
    (`ask: rating` and `ask: ranking`). Shows the 3×3 matrix, agreement, agreement where both decide, Cohen's kappa,
    coverage and position bias, with 95 % intervals from resampling prompts; and how often the judge agrees with itself,
    if it was asked again (files of a second round, or an experiment with `judge.repeats`).

    \b
    Examples:
      textalign consistency ratings.csv rankings.csv --ratings-format sparse_ratings --rankings-format sparse_rankings
      textalign consistency my_rated my_ranked --iteration 1
    """
    from textalign_dagster.feedback_files.consistency import consistency as compare
    from textalign_dagster.feedback_files.formats import read_feedback

    again: dict[str, Any] = {}
    if iteration is None:
        files = read_feedback(Path(ratings), ratings_format), read_feedback(Path(rankings), rankings_format)
        inputs = [
            f"{path}: {found.summary()}" for path, found in zip((ratings, rankings), files, strict=True)
        ]
        rated, ranked, identical = files[0].feedback, files[1].pairs_as_read, files[1].identical
        if ranked.is_empty():
            raise SettingsError(
                f"{rankings}: holds no rankings of pairs; give a file of rankings as the second argument"
            )
        if ratings_again is not None:
            again["repeated_ratings"] = rated, read_feedback(ratings_again, ratings_format).feedback
        if rankings_again is not None:
            again["repeated_pairs"] = read_feedback(rankings_again, rankings_format).pairs_as_read
    elif ratings_again is not None or rankings_again is not None:
        raise SettingsError(
            "--ratings-again, --rankings-again: these take files; for experiments, set judge.repeats"
        )
    else:
        from resources.stored_feedback import ratings_and_rankings

        first, second = library_of(ratings)[1], library_of(rankings)[1]
        found, ranked = ratings_and_rankings(open_store(), first, second, iteration)
        rated, again["repeated_ratings"] = found.feedback, found.rounds
        identical = ()
        inputs = [f"{first}: {rated.height:,} ratings", f"{second}: {ranked.height:,} pairs"]
    try:
        report = compare(rated, ranked, margin=margin, **again)
    except ValueError as error:
        raise SettingsError(f"{ratings}, {rankings}: {error}") from None
    if as_json:
        print_json(asdict(report))
        return
    for line in inputs:
        click.echo(line)
    _print_agreement(report.agreement)
    known = {sample for sample, status in rated.select("sample_id", "status").iter_rows() if status == "ok"}
    refused = [winner for sample, _, winner in identical if sample in known and winner is not None]
    if refused and report.agreement.agreement.value is not None:
        # Identical texts have equal ratings, so the rankings agree where they report a tie.
        agreed = report.agreement.agreement.value * report.coverage.both + refused.count("tie")
        click.echo(
            f"agreement including the {len(refused)} pairs of identical texts, which are excluded above: "
            f"{agreed / (report.coverage.both + len(refused)):.3f}"
        )
    coverage = report.coverage
    click.echo(
        f"pairs: {coverage.pairs:,}, ranked {coverage.ranked:,}, rated {coverage.rated:,}, both {coverage.both:,}"
    )
    if report.position.first_wins.value is not None:
        click.echo(f"calls won by the response shown first: {_estimate_text(report.position.first_wins)}")
    click.echo(f"pairs in which the same position won twice: {_estimate_text(report.position.flips)}")
    for name, repeats in (("ratings", report.rating_repeats), ("rankings", report.ranking_repeats)):
        if repeats is not None:
            click.echo(f"self-agreement of the judge, repeated {name}: {_estimate_text(repeats.agreement)}")


def _print_agreement(found: Agreement) -> None:
    classes = ("first better", "tie", "second better")
    click.echo(f"\n{'ratings':<16}{'rankings':>14}")
    click.echo(f"{'':<16}" + "".join(f"{name:>14}" for name in classes))
    for name, row in zip(classes, found.matrix, strict=True):
        click.echo(f"{name:<16}" + "".join(f"{count:>14,}" for count in row))
    click.echo(f"\nagreement: {_estimate_text(found.agreement)}")
    click.echo(f"agreement where both decide: {_estimate_text(found.decisive)}")
    click.echo(f"Cohen's kappa: {_estimate_text(found.kappa)}")


def _estimate_text(found: Estimate) -> str:
    if found.value is None:
        return "undefined"
    interval = "" if found.lo is None or found.hi is None else f" ({found.lo:.3f} to {found.hi:.3f})"
    return f"{found.value:.3f}{interval}, n = {found.rows:,}"


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="NAME=FILE...")
@click.option(
    "--reference", type=FILE, help="Ratings of the reference's answers; required for files of ratings."
)
@click.option(
    "--format",
    "format_name",
    type=click.Choice(("sparse", "plain", ALPACA_EVAL)),
    metavar="FORMAT",
    default="sparse",
    show_default=True,
    help="Format of all files: sparse (sparse_feedback's CSV), plain, or alpaca_eval (its annotations.json).",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@readable
def winrates(models: tuple[str, ...], reference: Path | None, format_name: str, as_json: bool) -> None:
    """Win rates of models against a reference on the same items, by ratings and by rankings.

    Each NAME=FILE holds ratings of a model's answers, to be compared with those of --reference, or rankings of
    pairs whose first answer is the reference's. A model named twice, once with each, is evaluated by both:
    the matrix of training and evaluation protocols, if the models were trained on either. A tie counts as half a win;
    intervals come from resampling prompts. Differences between two models, and between one model's two protocols, are
    computed on the items that both have. Items that only one side has, and unusable judgements, are counted and left
    out.

    \b
    Example:
      textalign winrates --reference reference.csv rating_rm=rated_a.csv rating_rm=ranked_a.csv \\
        ranking_rm=rated_b.csv ranking_rm=ranked_b.csv
    """
    from textalign_dagster.feedback_files.formats import read_feedback
    from textalign_dagster.feedback_files.win_rates import (
        difference_text,
        paired_differences,
        rate_text,
        win_rate,
    )

    known = None if reference is None else read_feedback(reference, _file_format(format_name, "ratings"))
    found: dict[tuple[str, str], Outcomes] = {}
    for given in models:
        name, equals, path = given.partition("=")
        if not equals or not name or not path:
            raise SettingsError(f"{given!r}: expected NAME=FILE, such as rating_rm=rated.csv")
        protocol, outcomes = _outcomes(path, format_name, known)
        if (name, protocol) in found:
            raise SettingsError(f"{path}: {name} already has a file of {protocol}; use another name")
        found[name, protocol] = outcomes
    rates = {key: win_rate(outcomes) for key, outcomes in found.items()}
    differences = paired_differences(found)
    if as_json:
        each = [{"model": name, "protocol": by, **asdict(rate)} for (name, by), rate in rates.items()]
        pairs = [{"first": a, "second": b, **asdict(apart)} for a, b, apart in differences]
        print_json({"win_rates": each, "differences": pairs})
        return
    for (name, by), rate in rates.items():
        click.echo(f"{name}, by {by}: {rate_text(rate)}")
    for first, second, apart in differences:
        click.echo(difference_text(first, second, apart))


def _outcomes(path: str, format_name: str, reference: Imported | None) -> tuple[str, Outcomes]:
    """The protocol of a file, ratings or rankings, and its outcomes against the reference."""
    from textalign_dagster.feedback_files.alpaca_eval import read_annotations
    from textalign_dagster.feedback_files.formats import read_feedback
    from textalign_dagster.feedback_files.win_rates import by_rankings, by_ratings

    if format_name == ALPACA_EVAL:
        return "rankings", read_annotations(Path(path))
    read, protocol = read_feedback(Path(path), _file_format(format_name, "rankings")), "rankings"
    outcomes = by_rankings(read)
    if read.pairs.is_empty() and not read.identical:
        read, protocol = read_feedback(Path(path), _file_format(format_name, "ratings")), "ratings"
        if read.feedback.is_empty():
            raise SettingsError(f"{path}: neither ratings nor rankings of format {format_name}")
        if reference is None:
            raise SettingsError(f"{path}: holds ratings; give those of the reference as --reference")
        outcomes = by_ratings(read, reference)
    if read.refused:
        click.echo(f"{path}: {read.summary()}", err=True)
    return protocol, outcomes


def _file_format(format_name: str, protocol: str) -> str:
    return f"sparse_{protocol}" if format_name == "sparse" else "plain"


COMMANDS = (consistency, winrates)
