"""The command that removes what is no longer needed."""

from __future__ import annotations

import os
from dataclasses import asdict
from datetime import timedelta
from itertools import groupby
from typing import TYPE_CHECKING

import click

from textalign_dagster.cli.command import open_store, print_json, readable
from textalign_dagster.experiment.files import Library, home
from textalign_dagster.settings import SettingsError

if TYPE_CHECKING:
    from resources.store.removal import Removable

RECENT_HOURS = {False: 1.0, True: 24.0}
"""Anything younger is kept; on an object store (True), other machines may be writing."""
SHOWN = 8  # places listed per kind


@click.command()
@click.option("--apply", is_flag=True, help="Remove what is listed (default: only list it).")
@click.option("--unreferenced", is_flag=True, help="Also artifacts that no cell of any experiment needs.")
@click.option(
    "--older-than",
    type=click.FloatRange(0),
    metavar="HOURS",
    help="Keep what was written in the last HOURS (default: 1; on an object store 24).",
)
@click.option("--json", "as_json", is_flag=True, help="As JSON: a row per item.")
@readable
def clean(apply: bool, unreferenced: bool, older_than: float | None, as_json: bool) -> None:
    """Lists what can be removed, with sizes and reasons; --apply removes it.

    Leftovers of interrupted work: chunks of samples, attempts of killed processes, unfinished training runs; and
    parts of evaluations and log-probabilities of policies that are gone. --unreferenced adds outputs that no cell
    uses any more, directly or through outputs derived from them. Judge calls (the ledger) are always kept.

    \b
    Examples:
      textalign clean
      textalign clean --unreferenced --older-than 48
    """
    from resources.store.removal import forgotten, removable, remove

    store = open_store()
    age = timedelta(hours=RECENT_HOURS[store.is_remote] if older_than is None else older_than)
    if apply:
        _refuse_while_running()
    found = removable(store, home(), older_than=age, unreferenced=unreferenced)
    if apply:
        remove(store, found, age)
    if as_json:
        print_json([asdict(one) for one in found])
        return
    _print_items(found)
    if unreferenced:
        for name in forgotten(store, Library.default().paths):
            click.echo(
                f"{name} still has cells but no experiment file; its artifacts are kept. Remove "
                f"{store.storage.place(f'cells/{name}')} to release them"
            )
    if not found:
        click.echo("nothing to remove")
    else:
        what = f"{len(found):,} items, {_size(sum(one.bytes for one in found))}"
        click.echo(
            f"removed: {what}" if apply else f"{what}; nothing was removed: use --apply to remove them"
        )


def _refuse_while_running() -> None:
    """Raises `SettingsError` if Dagster has a run queued or under way."""
    if not os.environ.get("DAGSTER_HOME") and not (home() / "dagster").is_dir():
        return  # nothing has ever been run
    from textalign_dagster.cli.running import dagster_instance
    from textalign_dagster.loop.abandoned import EXPERIMENT_TAG, runs_under_way

    with dagster_instance() as instance:
        for run in runs_under_way(instance):
            raise SettingsError(
                f"run {run.run_id[:8]} of {run.tags.get(EXPERIMENT_TAG, 'no experiment')} is under way; nothing was "
                "removed: wait for it, or cancel it in the UI"
            )


def _print_items(found: list[Removable]) -> None:
    from resources.store.removal import WHY

    for kind, several in groupby(found, key=lambda one: one.kind):
        ones = list(several)
        click.echo(f"{kind}: {len(ones):,}, {_size(sum(one.bytes for one in ones))}, {WHY[kind]}")
        largest = sorted(ones, key=lambda one: (-one.bytes, one.place))
        for one in largest[:SHOWN]:
            click.echo(f"  {_size(one.bytes):>9}  {one.written:%Y-%m-%d}  {one.place}")
        if len(ones) > SHOWN:
            click.echo(f"  … and {len(ones) - SHOWN:,} smaller ones (--json lists all)")


def _size(count: int) -> str:
    """A number of bytes with its unit."""
    size = float(count)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
