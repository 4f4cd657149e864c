"""Messages from a running training: Pipes messages to Dagster, or lines on stderr when run by hand."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from dagster_pipes import DAGSTER_PIPES_CONTEXT_ENV_VAR, open_dagster_pipes


class Reporter(Protocol):
    """Reports ``{"done", "total", "loss", "tokens_per_s", "lr"}`` and plain sentences.

    Adaptive coefficients (``kl_coef``, ``entropy_coef``) are included, with the values they adapt to (``kl``,
    ``entropy``: means over samples, in nats).
    """

    def progress(self, values: Mapping[str, Any]) -> None: ...

    def say(self, sentence: str) -> None: ...


class Silent:
    """Reports nothing: for ranks other than 0."""

    def progress(self, values: Mapping[str, Any]) -> None:
        pass

    def say(self, sentence: str) -> None:
        pass


class _Pipes:
    def __init__(self, context: Any):
        self._context = context

    def progress(self, values: Mapping[str, Any]) -> None:
        self._context.report_custom_message({"progress": dict(values)})

    def say(self, sentence: str) -> None:
        self._context.log.info(sentence)


class _Lines:
    def progress(self, values: Mapping[str, Any]) -> None:
        words = [f"step {values['done']}/{values['total']}"]
        words += [f"{name} {value:.4g}" for name, value in values.items() if name not in ("done", "total")]
        print("  ".join(words), file=sys.stderr, flush=True)

    def say(self, sentence: str) -> None:
        print(sentence, file=sys.stderr, flush=True)


@contextmanager
def open_reporter() -> Iterator[Reporter]:
    """This process's reporter. An exception inside the block is passed to Dagster with its message."""
    if os.environ.get("RANK", "0") != "0":
        yield Silent()
    elif DAGSTER_PIPES_CONTEXT_ENV_VAR in os.environ:
        with open_dagster_pipes() as context:
            yield _Pipes(context)
    else:
        yield _Lines()
