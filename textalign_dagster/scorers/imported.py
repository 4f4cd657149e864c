"""Feedback that was collected elsewhere (from people, by another program), as a source of feedback."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from textalign_dagster.ids import content_hash
from textalign_dagster.methods import FeedbackKind
from textalign_dagster.scorers.base import Scorer
from textalign_dagster.scorers.file_stamps import file_hash

IMPORTED_VERSION = "1"
"""Raised with every change of how judgements find their samples."""

ITERATION = "{iteration}"


class ImportedScorer(Scorer):
    """Judgements read from a file, matched by sample_id, else by prompt and text; higher is better."""

    measures: ClassVar[bool] = False  # they are about the samples of an iteration, and say nothing of others

    name: Literal["imported"] = "imported"
    path: str = Field(
        ...,
        min_length=1,
        description="The file of judgements (relative to the experiment file); {iteration} stands for the iteration.",
    )
    format: Literal["plain", "alt", "cut", "sparse_ratings"] = Field(
        "plain", description="As in `textalign import`: plain, alt, cut or sparse_ratings."
    )
    kind: Literal["reward", "text", "category", "judgment"] = Field(
        "reward",
        description="What is taken of a judgement: its number (reward), its words with their number (text), "
        "its label (category), or the label with the words, where there are any (judgment).",
    )
    aspect: str | None = Field(None, description="Of a file with several aspects, the one that counts.")
    labels: tuple[str, ...] | None = Field(
        None, strict=False, min_length=2, description="format alt: the categories; null: ALT_LMC's four."
    )
    scores: tuple[float, float] | None = Field(
        None, strict=False, description="format alt: lowest and highest score beside words; null: 0 to 3."
    )
    skip_refused: bool = Field(
        False, description="Go on with the good rows of a file although others cannot be read."
    )

    @field_validator("path")
    @classmethod
    def _places(cls, path: str) -> str:
        unknown = [place for place in re.findall(r"\{[^{}]*\}", path) if place != ITERATION]
        if unknown:
            raise ValueError(f"{unknown[0]} means nothing here; a path may hold {ITERATION}")
        return path

    @model_validator(mode="after")
    def _alt_only(self) -> ImportedScorer:
        if self.format != "alt" and (self.labels is not None or self.scores is not None):
            raise ValueError("labels, scores: only format alt reads them; leave them out")
        return self

    def file(self, iteration: int | None) -> Path:
        """The file of an iteration.

        Raises:
            ValueError: the path goes by the iteration, and none is known.
        """
        if ITERATION in self.path and iteration is None:
            raise ValueError(
                f"{self.path} needs an iteration, and there is none here; give a path without it"
            )
        return Path(self.path.replace(ITERATION, str(iteration)))

    @property
    def better(self) -> Literal["lower", "higher"]:
        return "higher"

    @property
    def kinds(self) -> tuple[FeedbackKind, ...]:
        return (self.kind,)

    @property
    def version(self) -> str:
        return f"{IMPORTED_VERSION}+{content_hash(self.identity)[:8]}"

    @property
    def identity(self) -> dict[str, Any]:
        """With the content of the file, or of every iteration's that is there."""
        path = Path(self.path)
        if ITERATION not in self.path:
            return {**self._settings, "content": file_hash(path)}
        pattern = self._pattern
        folder = path.parent
        names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        files = {name: file_hash(folder / name) for name in names if pattern.fullmatch(name)}
        return {**self._settings, "content": files}

    def identity_at(self, iteration: int) -> dict[str, Any]:
        """With the content of that iteration's file only: another iteration's does not matter."""
        return {**self._settings, "content": file_hash(self.file(iteration))}

    @property
    def _settings(self) -> dict[str, Any]:
        return {**self.model_dump(mode="json", exclude={"path"}), "reader": IMPORTED_VERSION}

    @property
    def _pattern(self) -> re.Pattern[str]:
        before, *after = (re.escape(part) for part in Path(self.path).name.split(ITERATION))
        return re.compile(before + "".join(rf"\d+{part}" for part in after))
