"""The interface of all scorers."""

from __future__ import annotations

import re
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from textalign_dagster.methods import FeedbackKind
from textalign_dagster.settings import Settings

_TRAINED = re.compile(r"([A-Za-z0-9_+.-]+)@(\d{1,3})")


def trained_by(model: str) -> tuple[str, int] | None:
    """Experiment and iteration of a model named EXPERIMENT@ITERATION; None for a folder or a hub model."""
    named = _TRAINED.fullmatch(model)
    return None if named is None else (named[1], int(named[2]))


class Span(NamedTuple):
    """A part of a text, ``text[start:end]``, and what it is."""

    start: int
    end: int
    kind: str


class Scorer(Settings):
    """Declares one way to score samples (prompt, reference, text); ``resources/rewards/scoring.py`` runs it.

    There are four kinds: a :class:`TextScorer`, a pure function of the text; a model, which runs in a
    worker process; a language model that writes judgments; and a file of judgements that were
    collected elsewhere.
    """

    measures: ClassVar[bool] = True
    """Whether it can score any text, so that an evaluation can report it."""

    name: str

    @property
    def trained(self) -> tuple[str, int] | None:
        """Experiment and iteration that trained its model; None: not trained by an experiment."""
        return None

    @property
    @abstractmethod
    def version(self) -> str:
        """Changes whenever any sample would be scored differently; stored with every score."""

    @property
    @abstractmethod
    def better(self) -> Literal["lower", "higher"]:
        """Which scores are good; in FEEDBACK's ``value``, higher is always better."""

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the scores, as JSON, for the keys of artifacts derived from them.

        Never raises: a missing file has the hash None, and scoring reports what is missing.
        """
        return {"name": self.name, "version": self.version}

    def identity_at(self, iteration: int) -> dict[str, Any]:
        """The :attr:`identity` in one iteration, for scorers that read one file per iteration."""
        return self.identity

    def value(self, score: float) -> float:
        """The score as a value, where higher is better."""
        return score if self.better == "higher" else -score

    @property
    def kinds(self) -> tuple[FeedbackKind, ...]:
        """The kinds of feedback it can give a method."""
        return ("reward",)


class TextScorer(Scorer):
    """A pure function of its settings and the text, cheap enough to run anywhere."""

    def check_usable(self) -> None:
        """Loads what it needs in addition to its settings.

        Raises:
            SettingsError: something is missing; the message names the scorer's field.
        """

    @abstractmethod
    def score(self, texts: Sequence[str]) -> list[float | None]:
        """One number per text, in order; None where it is undefined (usually because there is nothing to score)."""

    def spans(self, text: str) -> list[Span]:
        """The parts of the text that the score is based on, sorted, without overlaps; empty where not applicable."""
        return []


def merge_spans(spans: Iterable[Span], touching: bool = True) -> list[Span]:
    """The spans in order, overlapping (or touching) ones merged into one of the first one's kind."""
    merged: list[Span] = []
    for span in sorted(spans):
        if merged and span.start < merged[-1].end + touching:
            last = merged[-1]
            merged[-1] = Span(last.start, max(last.end, span.end), last.kind)
        else:
            merged.append(span)
    return merged
