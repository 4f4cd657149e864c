"""Feedback collected elsewhere (from people or by another program), as a scorer."""

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
"""Raised with every change to how judgements are matched to samples."""

ITERATION = "{iteration}"


class ImportedScorer(Scorer):
    """Judgements read from a file, matched by sample_id, else by prompt and text; higher is better."""

    measures: ClassVar[bool] = False  # they only cover an iteration's samples

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
        description="What is used of a judgement: its number (reward), its text with the number (text), its "
        "label (category), or the label with the text, if any (judgment).",
    )
    aspect: str | None = Field(None, description="The aspect to use from a file with several.")
    labels: tuple[str, ...] | None = Field(
        None, strict=False, min_length=2, description="format alt: the categories; null: ALT_LMC's four."
    )
    scores: tuple[float, float] | None = Field(
        None,
        strict=False,
        description="format alt: lowest and highest score of textual feedback; null: 0 to 3.",
    )
    skip_refused: bool = Field(
        False, description="Continue with the valid rows of a file if others cannot be read."
    )

    @field_validator("path")
    @classmethod
    def _places(cls, path: str) -> str:
        unknown = [place for place in re.findall(r"\{[^{}]*\}", path) if place != ITERATION]
        if unknown:
            raise ValueError(f"{unknown[0]} is not a placeholder; a path can contain {ITERATION}")
        return path

    @model_validator(mode="after")
    def _alt_only(self) -> ImportedScorer:
        if self.format != "alt" and (self.labels is not None or self.scores is not None):
            raise ValueError("labels, scores: only format alt uses them; remove them")
        return self

    def file(self, iteration: int | None) -> Path:
        """The file of an iteration.

        Raises:
            ValueError: the path contains {iteration}, and no iteration is given.
        """
        if ITERATION in self.path and iteration is None:
            raise ValueError(
                f"{self.path} needs an iteration, and none is known here; give a path without {{iteration}}"
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
        """Includes the content of the file, or of the existing file of every iteration."""
        path = Path(self.path)
        if ITERATION not in self.path:
            return {**self._settings, "content": file_hash(path)}
        pattern = self._pattern
        folder = path.parent
        names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
        files = {name: file_hash(folder / name) for name in names if pattern.fullmatch(name)}
        return {**self._settings, "content": files}

    def identity_at(self, iteration: int) -> dict[str, Any]:
        """Includes the content of that iteration's file only: other iterations' files do not matter."""
        return {**self._settings, "content": file_hash(self.file(iteration))}

    @property
    def _settings(self) -> dict[str, Any]:
        return {**self.model_dump(mode="json", exclude={"path"}), "reader": IMPORTED_VERSION}

    @property
    def _pattern(self) -> re.Pattern[str]:
        before, *after = (re.escape(part) for part in Path(self.path).name.split(ITERATION))
        return re.compile(before + "".join(rf"\d+{part}" for part in after))
