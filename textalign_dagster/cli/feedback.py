"""The commands for feedback: forecasts of its cost, export to and import from other projects' formats."""

from __future__ import annotations

from pathlib import Path

import click

from textalign_dagster.cli.command import library_of, open_store, print_json, readable
from textalign_dagster.settings import SettingsError

FORMATS = ("alt", "cut", "sparse_ratings", "sparse_rankings", "preferences", "plain")
READ_ONLY = ("critiques", "shepherd")
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
    """Estimates the cost of judging an iteration: calls, tokens, money, time, and how many calls are already paid for.

    Makes no calls. The number of calls is exact once the iteration's samples exist; before that, it is an upper bound.

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
        f"{name}, iteration {iteration}: {found['calls']:,} calls{bound}, {found['cached']:,} already paid for"
    )
    if found["assumption"] is not None:
        click.echo(f"assumed: {found['assumption']}")
    click.echo(f"tokens in: about {found['tokens_in']:,}, at most {found['tokens_in_max']:,}")
    for title, key in (
        ("tokens out, at most", "tokens_out_max"),
        ("tokens out, expected", "tokens_out_expected"),
        ("USD, at most", "usd_max"),
        ("USD, expected", "usd_expected"),
        ("seconds", "seconds"),
    ):
        value = found[key]
        click.echo(f"{title}: {'unknown' if value is None else f'{value:,.4g}'}")


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
    judgement per row, .jsonl or .parquet; alpaca_eval: the outputs of an evaluation, as AlpacaEval reads them. Reports
    what the format cannot hold. An iteration's other stages can be written in ALT's format, too (--stage).

    \b
    Examples:
      textalign export pep8_alt_lmu feedback.jsonl --iteration 1 --format alt
      textalign export pep8_alt_lmu samples.jsonl --iteration 1 --format alt --stage samples
      textalign export pep8_alt_lmu outputs.json --iteration 1 --format alpaca_eval
    """
    from resources.stored_feedback import judgements_of, unjudged_samples
    from textalign_dagster.feedback_files.formats import write_feedback
    from textalign_dagster.feedback_files.plain import write_unjudged

    library, name = library_of(experiment)
    settings = library.load(name)
    store = open_store()
    if format_name == ALPACA_EVAL:
        import polars as pl

        from resources.stored_feedback import evaluated_samples
        from textalign_dagster.experiment.sources import written_prompts
        from textalign_dagster.feedback_files.alpaca_eval import write_alpaca_eval

        written = written_prompts(settings)
        outputs = evaluated_samples(store, name, iteration).with_columns(pl.col("prompt").replace(written))
        dataset, generator = settings.task.name, f"{name}@{iteration}"
        click.echo(write_alpaca_eval(path, outputs, dataset=dataset, generator=generator).summary())
        return
    if iteration == 0:
        raise SettingsError("--iteration 0: only --format alpaca_eval can export the base policy")
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
            f"--format {format_name}: the judge of {name} compared no samples; set `judge.ask: ranking`"
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
    type=click.Choice((*FORMATS, *READ_ONLY)),
    metavar="FORMAT",
    required=True,
    help="alt, cut, critiques, shepherd, sparse_ratings, sparse_rankings, preferences or plain.",
)
@click.option(
    "--template",
    help="With --format alt: how the file's prompts carry their condition, e.g. '{condition} input: {prompt}'.",
)
@click.option("--skip-refused", is_flag=True, help="Write the valid rows even if others are refused.")
@readable
def import_feedback(
    path: Path, target: Path, format_name: str, template: str | None, skip_refused: bool
) -> None:
    """Reads feedback collected elsewhere from PATH, checks it, and writes it to TARGET in the plain format.

    TARGET ends in .jsonl or .parquet: one judgement per row. Rows that cannot be read are listed with
    line, reason and example, and stop the import. ALT's files of every stage can be read; for prompts, TARGET is a
    file for `prompts.path`.

    \b
    Example:
      textalign import ratings.csv ratings.parquet --format sparse_ratings
    """
    from textalign_dagster.feedback_files.alt_prompts import ImportedPrompts, alt_stage, read_alt_prompts
    from textalign_dagster.feedback_files.formats import read_feedback, write_feedback
    from textalign_dagster.feedback_files.imported import Imported

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
            f"{path}: {len(found.refused)} of {found.rows} rows are refused and nothing was written; fix them, or "
            "use --skip-refused"
        )
    if isinstance(found, ImportedPrompts):
        from textalign_dagster.cli.alt_exchange import write_prompts

        click.echo(write_prompts(target, found).summary())
        return
    click.echo(write_feedback(target, "plain", found.samples, found.feedback, found.pairs).summary())


COMMANDS = (forecast, export_feedback, import_feedback)
