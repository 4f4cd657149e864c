"""The commands about feedback: what it will take, other projects' files in and out, how consistent it is."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from textalign_dagster.cli.command import library_of, open_store, print_json, readable
from textalign_dagster.settings import SettingsError

if TYPE_CHECKING:
    from textalign_dagster.judging.agreement import Agreement
    from textalign_dagster.judging.win_rates import Outcomes
    from textalign_dagster.measures.statistics import Estimate

FORMATS = ("alt", "cut", "sparse_ratings", "sparse_rankings", "preferences", "plain")
ALPACA_EVAL = "alpaca_eval"
ALT_STAGES = ("prompts", "samples", "feedback", "toxicity")
FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("experiment")
@click.option(
    "--iteration", "-k", type=click.IntRange(min=1), default=1, show_default=True, help="Which iteration."
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@readable
def forecast(experiment: str, iteration: int, as_json: bool) -> None:
    """Estimates the cost of judging an iteration: calls, tokens, money, time, and how much is already paid.

    Makes no call. The number of calls is exact once the iteration's samples exist; before that, it is an upper bound.

    \b
    Example:
      textalign forecast my_experiment --iteration 2
    """
    from textalign_dagster.reports.forecasting import forecast_iteration

    library, name = library_of(experiment)
    found = forecast_iteration(open_store(), name, library.load(name), iteration)
    if as_json:
        print_json(found)
        return
    bound = "" if found["samples_exist"] else " at most (the samples do not exist yet)"
    click.echo(
        f"{name}, iteration {iteration}: {found['calls']:,} calls{bound}, {found['cached']:,} paid already"
    )
    if found["assumption"] is not None:
        click.echo(f"assumed: {found['assumption']}")
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
@click.option(
    "--iteration",
    "-k",
    type=click.IntRange(min=0),
    required=True,
    help="Which iteration (0: the base policy's evaluation).",
)
@click.option(
    "--format",
    "format_name",
    type=click.Choice((*FORMATS, ALPACA_EVAL)),
    metavar="FORMAT",
    default="plain",
    show_default=True,
    help="alt, cut, sparse_ratings, sparse_rankings, preferences, plain or alpaca_eval.",
)
@click.option(
    "--stage",
    type=click.Choice(ALT_STAGES),
    metavar="STAGE",
    default="feedback",
    show_default=True,
    help="With --format alt: prompts, samples (under conditioned prompts), feedback or toxicity.",
)
@readable
def export_feedback(experiment: str, path: Path, iteration: int, format_name: str, stage: str) -> None:
    """Writes an iteration's samples and feedback to PATH, in another project's format.

    alt: ALT's JSON Lines; cut: CUT's and Alpaca's JSON; sparse_ratings: the CSV of sparse_feedback, and
    sparse_rankings that of a judge's comparisons; preferences: the comparisons as TRL's JSON Lines; plain: one
    judgement a row, .jsonl or .parquet; alpaca_eval: the outputs of an evaluation, as AlpacaEval reads them. Reports
    what the format cannot hold. Of an iteration's other stages there are files of ALT's too (--stage).

    \b
    Examples:
      textalign export pep8_alt_lmu feedback.jsonl --iteration 1 --format alt
      textalign export pep8_alt_lmu samples.jsonl --iteration 1 --format alt --stage samples
      textalign export pep8_alt_lmu outputs.json --iteration 1 --format alpaca_eval
    """
    from resources.stored_feedback import judgements_of, unjudged_samples
    from textalign_dagster.judging.convert import write_feedback
    from textalign_dagster.judging.plain_files import write_unjudged

    library, name = library_of(experiment)
    settings = library.load(name)
    store = open_store()
    if format_name == ALPACA_EVAL:
        import polars as pl

        from resources.stored_feedback import evaluated_samples
        from textalign_dagster.experiment.sources import written_prompts
        from textalign_dagster.judging.alpaca_eval import write_alpaca_eval

        written = written_prompts(settings)
        outputs = evaluated_samples(store, name, iteration).with_columns(pl.col("prompt").replace(written))
        dataset, generator = settings.task.name, f"{name}@{iteration}"
        click.echo(write_alpaca_eval(path, outputs, dataset=dataset, generator=generator).summary())
        return
    if iteration == 0:
        raise SettingsError("--iteration 0: only --format alpaca_eval has something of the base policy")
    if stage != "feedback":
        if format_name != "alt":
            raise SettingsError(f"--stage {stage}: only --format alt has such a file")
        from textalign_dagster.cli.alt_exchange import export_alt

        try:
            click.echo(export_alt(store, name, settings, iteration, stage, path).summary())
        except ValueError as error:
            raise SettingsError(f"--stage {stage}: {error}") from None
        return
    unjudged = unjudged_samples(store, name, iteration)
    if unjudged is not None:
        if format_name != "plain":
            raise SettingsError(
                f"{name}, iteration {iteration}, has no feedback yet; --format plain writes its samples, to be judged"
            )
        click.echo(f"no feedback yet, samples only: {write_unjudged(path, unjudged).summary()}")
        return
    found = judgements_of(store, name, iteration)
    if format_name in ("sparse_rankings", "preferences") and found.pairs is None:
        raise SettingsError(
            f"--format {format_name}: the judge of {name} compared no samples; `judge.ask: ranking` does"
        )
    try:
        done = write_feedback(path, format_name, found.samples, found.feedback, found.pairs)
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
    help="alt, cut, sparse_ratings, sparse_rankings, preferences or plain.",
)
@click.option(
    "--template",
    help="With --format alt: how the file's prompts carry their condition, e.g. '{condition} input: {prompt}'.",
)
@click.option("--skip-refused", is_flag=True, help="Write the good rows although others are refused.")
@readable
def import_feedback(
    path: Path, target: Path, format_name: str, template: str | None, skip_refused: bool
) -> None:
    """Reads feedback collected elsewhere from PATH, checks it, and writes it to TARGET in the plain format.

    TARGET ends in .jsonl or .parquet: one judgement a row. Rows that cannot be read are listed with
    line, reason and example, and stop the import. ALT's files are read at every stage: of prompts, TARGET is a file for
    `prompts.path`.

    \b
    Example:
      textalign import ratings.csv ratings.parquet --format sparse_ratings
    """
    from textalign_dagster.judging.alt_prompts import ImportedPrompts, alt_stage, read_alt_prompts
    from textalign_dagster.judging.convert import Imported, read_feedback, write_feedback

    found: Imported | ImportedPrompts
    if format_name != "alt":
        if template is not None:
            raise SettingsError(
                f"--template: files of format {format_name} carry no conditions; leave it out"
            )
        found = read_feedback(path, format_name)
    elif alt_stage(path) == "prompts":
        found = read_alt_prompts(path, template=template)
    else:
        found = read_feedback(path, format_name, template=template)
    click.echo(found.summary())
    if found.refused and not skip_refused:
        raise SettingsError(
            f"{path}: {len(found.refused)} of {found.rows} rows are refused and nothing was written; mend them, or "
            "give --skip-refused"
        )
    if isinstance(found, ImportedPrompts):
        from textalign_dagster.cli.alt_exchange import write_prompts

        click.echo(write_prompts(target, found).summary())
        return
    click.echo(write_feedback(target, "plain", found.samples, found.feedback, found.pairs).summary())


@click.command()
@click.argument("ratings")
@click.argument("rankings")
@click.option(
    "--ratings-format",
    type=click.Choice(FORMATS),
    metavar="FORMAT",
    default="plain",
    help="Of the file RATINGS; as in import.",
)
@click.option(
    "--rankings-format",
    type=click.Choice(FORMATS),
    metavar="FORMAT",
    default="plain",
    help="Of the file RANKINGS; as in import.",
)
@click.option(
    "--iteration", "-k", type=click.IntRange(min=1), help="RATINGS and RANKINGS are experiments: of this one."
)
@click.option("--margin", type=float, default=0.0, show_default=True, help="Ratings this close tie.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@readable
def consistency(
    ratings: str,
    rankings: str,
    ratings_format: str,
    rankings_format: str,
    iteration: int | None,
    margin: float,
    as_json: bool,
) -> None:
    """Compares ratings with rankings of the same samples, matched by id.

    RATINGS and RANKINGS are files, or with --iteration two experiments whose judges looked at the same samples
    (`ask: rating` and `ask: ranking`). Shows the 3×3 matrix, agreement, agreement where both decide, Cohen's kappa,
    coverage and position bias, with 95 % intervals from resampling prompts.

    \b
    Examples:
      textalign consistency ratings.csv rankings.csv --ratings-format sparse_ratings --rankings-format sparse_rankings
      textalign consistency my_rated my_ranked --iteration 1
    """
    from textalign_dagster.judging.consistency import consistency as compare
    from textalign_dagster.judging.convert import read_feedback

    if iteration is None:
        files = read_feedback(Path(ratings), ratings_format), read_feedback(Path(rankings), rankings_format)
        told = [f"{path}: {found.summary()}" for path, found in zip((ratings, rankings), files, strict=True)]
        rated, ranked, identical = files[0].feedback, files[1].pairs_as_read, files[1].identical
        if ranked.is_empty():
            raise SettingsError(f"{rankings}: holds no rankings of pairs; give a file of them second")
    else:
        from resources.stored_feedback import ratings_and_rankings

        first, second = library_of(ratings)[1], library_of(rankings)[1]
        rated, ranked = ratings_and_rankings(open_store(), first, second, iteration)
        identical = ()
        told = [f"{first}: {rated.height:,} ratings", f"{second}: {ranked.height:,} pairs"]
    try:
        report = compare(rated, ranked, margin=margin)
    except ValueError as error:
        raise SettingsError(f"{ratings}, {rankings}: {error}") from None
    if as_json:
        print_json(asdict(report))
        return
    for line in told:
        click.echo(line)
    _print_agreement(report.agreement)
    known = {sample for sample, status in rated.select("sample_id", "status").iter_rows() if status == "ok"}
    refused = [winner for sample, _, winner in identical if sample in known and winner is not None]
    if refused and report.agreement.agreement.value is not None:
        # Two equal texts have equal ratings: the rankings agree where they say so, too.
        agreed = report.agreement.agreement.value * report.coverage.both + refused.count("tie")
        click.echo(
            f"agreement with the {len(refused)} pairs of identical texts, which are refused here: "
            f"{agreed / (report.coverage.both + len(refused)):.3f}"
        )
    coverage = report.coverage
    click.echo(
        f"pairs: {coverage.pairs:,}, ranked {coverage.ranked:,}, rated {coverage.rated:,}, both {coverage.both:,}"
    )
    if report.position.first_wins.value is not None:
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


@click.command()
@click.argument("models", nargs=-1, required=True, metavar="NAME=FILE...")
@click.option("--reference", type=FILE, help="Ratings of the reference's answers; files of ratings need it.")
@click.option(
    "--format",
    "format_name",
    type=click.Choice(("sparse", "plain", ALPACA_EVAL)),
    metavar="FORMAT",
    default="sparse",
    show_default=True,
    help="Of all files: sparse (sparse_feedback's CSV), plain, or alpaca_eval (its annotations.json).",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
@readable
def winrates(models: tuple[str, ...], reference: Path | None, format_name: str, as_json: bool) -> None:
    """Win rates of models against a reference on the same items, by ratings and by rankings.

    Each NAME=FILE holds ratings of a model's answers, to be compared with those of --reference, or rankings of
    pairs whose first answer is the reference's. A model named twice, once with each, has a row with both:
    the matrix of training and evaluation protocols, if the models were trained by either. A tie counts a half;
    intervals come from resampling prompts. Differences of two models, and of one model's two protocols, are on the
    items that both have. Items that only one side has, and judgements that cannot be
    used, are counted and left out.

    \b
    Example:
      textalign winrates --reference reference.csv rating_rm=rated_a.csv rating_rm=ranked_a.csv \\
        ranking_rm=rated_b.csv ranking_rm=ranked_b.csv
    """
    from textalign_dagster.judging.alpaca_eval import read_annotations
    from textalign_dagster.judging.convert import read_feedback
    from textalign_dagster.judging.win_rates import (
        by_rankings,
        by_ratings,
        paired_differences,
        told,
        told_difference,
        win_rate,
    )

    formats = {"ratings": "plain", "rankings": "plain"}
    if format_name == "sparse":
        formats = {"ratings": "sparse_ratings", "rankings": "sparse_rankings"}
    known = None if reference is None else read_feedback(reference, formats["ratings"])
    found: dict[tuple[str, str], Outcomes] = {}
    for given in models:
        name, equals, path = given.partition("=")
        if not equals or not name or not path:
            raise SettingsError(f"{given!r}: a model is NAME=FILE, such as rating_rm=rated.csv")
        if format_name == ALPACA_EVAL:
            if (name, "rankings") in found:
                raise SettingsError(f"{path}: {name} has a file of rankings already; give another name")
            found[name, "rankings"] = read_annotations(Path(path))
            continue
        read = read_feedback(Path(path), formats["rankings"])
        protocol = "rankings"
        if read.pairs.is_empty() and not read.identical:
            read, protocol = read_feedback(Path(path), formats["ratings"]), "ratings"
            if read.feedback.is_empty():
                raise SettingsError(f"{path}: neither ratings nor rankings of format {format_name}")
            if known is None:
                raise SettingsError(f"{path}: holds ratings; give those of the reference as --reference")
        if (name, protocol) in found:
            raise SettingsError(f"{path}: {name} has a file of {protocol} already; give another name")
        if read.refused:
            click.echo(f"{path}: {read.summary()}", err=True)
        ranked = protocol == "rankings"
        found[name, protocol] = by_rankings(read) if ranked else by_ratings(read, known or read)
    rates = {key: win_rate(outcomes) for key, outcomes in found.items()}
    differences = paired_differences(found)
    if as_json:
        each = [{"model": name, "protocol": by, **asdict(rate)} for (name, by), rate in rates.items()]
        pairs = [{"first": a, "second": b, **asdict(apart)} for a, b, apart in differences]
        print_json({"win_rates": each, "differences": pairs})
        return
    for (name, by), rate in rates.items():
        click.echo(f"{name}, by {by}: {told(rate)}")
    for first, second, apart in differences:
        click.echo(told_difference(first, second, apart))


COMMANDS = (forecast, export_feedback, import_feedback, consistency, winrates)
