"""Shared by all commands: readable errors, experiments by name or path, the store, output."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from textalign_dagster.experiment.files import Library, home, store_url
from textalign_dagster.settings import SettingsError

if TYPE_CHECKING:
    from rich.console import Console

    from resources.store import ArtifactStore

P = ParamSpec("P")
R = TypeVar("R")


class Refused(click.ClickException):
    """An error the user can act on: one message, exit code 1."""

    def show(self, file: Any = None) -> None:
        click.echo(f"error: {self.message}", err=True)


def readable(command: Callable[P, R]) -> Callable[P, R]:
    """Turns the project's own errors into one message on stderr and exit code 1."""

    @wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return command(*args, **kwargs)
        except SettingsError as error:
            raise Refused(str(error)) from None
        except Exception as error:
            from resources.store import ArtifactError
            from resources.store.durable import full_disk, full_disk_error

            if full_disk(error):
                raise Refused(str(full_disk_error(home(), error))) from None
            if isinstance(error, ArtifactError):
                raise Refused(str(error)) from None
            raise

    return wrapped


def library_of(experiment: str) -> tuple[Library, str]:
    """The library, and the name in it of the experiment given by name or path."""
    path = Path(experiment)
    if path.suffix in (".yaml", ".yml") or "/" in experiment:
        if path.suffix != ".yaml":
            raise SettingsError(f"{path}: an experiment file ends in .yaml")
        if not path.is_file():
            raise SettingsError(f"{path}: no such file")
        return Library.default(path.resolve().parent), path.stem
    library = Library.default()
    library.path(experiment)  # raises if there is none, listing the known ones
    return library, experiment


def open_store() -> ArtifactStore:
    from resources.store import ArtifactStore

    return ArtifactStore(store_url())


def open_console() -> Console:
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=120)


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, indent=2, default=str))
