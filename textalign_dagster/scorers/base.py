"""What every scorer offers."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from textalign_dagster.methods import FeedbackKind
from textalign_dagster.settings import Settings

_TRAINED = re.compile(r"([A-Za-z0-9_+.-]+)@(\d{1,3})")


def trained_by(model: str) -> tuple[str, int] | None:
    """Experiment and iteration of a model called EXPERIMENT@ITERATION; None: it is a folder or on the hub."""
    named = _TRAINED.fullmatch(model)
    return None if named is None else (named[1], int(named[2]))


class Span(NamedTuple):
    """A part of a text: ``text[start:end]``, and what was found there."""

    start: int
    end: int
    kind: str


class Scorer(Settings):
    """Declares one way to score samples (prompt, reference, text); ``resources/rewards/scoring.py`` does it.

    A scorer is one of four: a :class:`TextScorer`, a pure function of the text; a model, which runs
    in a worker process; a language model that writes judgments; or a file of judgements that were
    collected elsewhere.
    """

    measures: ClassVar[bool] = True
    """Whether it gives any text a number, so that an evaluation can report it."""

    name: str

    @property
    def trained(self) -> tuple[str, int] | None:
        """Experiment and iteration that trained its model; None: no experiment did."""
        return None

    @property
    @abstractmethod
    def version(self) -> str:
        """Changes whenever some sample would be scored otherwise; stored with every score."""

    @property
    @abstractmethod
    def better(self) -> Literal["lower", "higher"]:
        """Which scores are good; FEEDBACK's ``value`` is higher for better."""

    @property
    def identity(self) -> dict[str, Any]:
        """All that the scores follow from, as JSON, for the keys of what is derived from them.

        Never raises: a file that is not there yet has no content, and scoring says what is missing.
        """
        return {"name": self.name, "version": self.version}

    def identity_at(self, iteration: int) -> dict[str, Any]:
        """The :attr:`identity` in one iteration, for scorers that read a file an iteration."""
        return self.identity

    def value(self, score: float) -> float:
        """The score as a value, which is higher for better."""
        return score if self.better == "higher" else -score

    @property
    def kinds(self) -> tuple[FeedbackKind, ...]:
        """The kinds of feedback a method can have from it."""
        return ("reward",)


class TextScorer(Scorer):
    """A pure function of its settings and the text, cheap enough to run anywhere."""

    def check_usable(self) -> None:
        """Loads what it needs beside its settings.

        Raises:
            SettingsError: that is missing; names the scorer's field.
        """

    @abstractmethod
    def score(self, texts: Sequence[str]) -> list[float | None]:
        """One number a text, in order; None where it is undefined (mostly: nothing to score)."""

    def spans(self, text: str) -> list[Span]:
        """What the score rests on, sorted, without overlaps; empty where that has no meaning."""
        return []


def merge_spans(spans: Iterable[Span], touching: bool = True) -> list[Span]:
    """The spans in order, those that overlap (or touch) made one; its kind is the first one's."""
    merged: list[Span] = []
    for span in sorted(spans):
        if merged and span.start < merged[-1].end + touching:
            last = merged[-1]
            merged[-1] = Span(last.start, max(last.end, span.end), last.kind)
        else:
            merged.append(span)
    return merged
