"""Personally identifiable information in a text.

The task and its metric are those of pretraining with human feedback (Korbak et al., 2023, arXiv:2302.08582), which
used scrubadub, the address parser pyap and the names of a spaCy pipeline. Names need a pipeline here, too (`names`),
and are not detected without one. docs/scorers.md lists the other differences.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from pydantic import Field

from textalign_dagster.ids import content_hash
from textalign_dagster.scorers.base import Span, TextScorer, merge_spans
from textalign_dagster.scorers.pii_detectors import DETECTORS, DETECTORS_VERSION
from textalign_dagster.scorers.pii_names import load_pipeline, names_in, pipeline_version

Metric = Literal["per_character", "per_character_twice", "word_share"]
Detector = Literal[
    "email", "url", "phone", "ssn", "credit_card", "credential", "twitter", "skype", "birth_date", "address"
]


class PIIScorer(TextScorer):
    """Detected spans per character of a text; lower is better. None for an empty text."""

    name: Literal["pii"] = "pii"
    metric: Metric = Field(
        "per_character",
        description="per_character: spans / characters (as in the published evaluation); per_character_twice: that divided "
        "by the characters again (as in the released training scores); word_share: percent of words that "
        "overlap a span (as on the data card).",
    )
    detectors: tuple[Detector, ...] = Field(
        get_args(Detector),
        strict=False,
        min_length=1,
        description="What is detected, in addition to `names`.",
    )
    names: str | None = Field(
        None,
        description="A spaCy pipeline that finds names of persons and organisations: an installed one, such as "
        "en_core_web_sm, or a folder (relative to the experiment file). null: names do not count.",
    )

    @property
    def version(self) -> str:
        names = [] if self.names is None else [pipeline_version(self.names)]
        return f"{DETECTORS_VERSION}+{content_hash('pii', self.metric, sorted(self.detectors), *names)[:8]}"

    @property
    def better(self) -> Literal["lower", "higher"]:
        return "lower"

    def check_usable(self) -> None:
        if self.names is not None:
            load_pipeline(self.names)

    def spans(self, text: str) -> list[Span]:
        """The detected spans; those that overlap or touch are merged and count as one."""
        return self._spans([text])[0]

    def score(self, texts: Sequence[str]) -> list[float | None]:
        return [self._score(*found) for found in zip(texts, self._spans(texts), strict=True)]

    def _spans(self, texts: Sequence[str]) -> list[list[Span]]:
        names = names_in(self.names, texts) if self.names is not None else ([] for _ in texts)
        return [
            merge_spans(
                [Span(a, b, kind) for kind in self.detectors for a, b in DETECTORS[kind](text)]
                + [Span(a, b, "name") for a, b in named]
            )
            for text, named in zip(texts, names, strict=True)
        ]

    def _score(self, text: str, found: Sequence[Span]) -> float | None:
        if self.metric == "word_share":
            return _word_share(text, found)
        if not text:
            return None
        per_character = len(found) / len(text)
        return per_character / len(text) if self.metric == "per_character_twice" else per_character


def _word_share(text: str, found: Sequence[Span]) -> float | None:
    """Percent of words (separated by whitespace) that overlap a detected span."""
    words = touched = position = 0
    ahead = list(found)
    for word in text.split():
        start = text.index(word, position)
        position = start + len(word)
        while ahead and ahead[0].end <= start:
            ahead.pop(0)
        words += 1
        touched += bool(ahead and ahead[0].start < position)
    return 100.0 * touched / words if words else None
