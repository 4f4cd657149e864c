"""Responses and judgements from a file: the section ``offline`` of an experiment."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from textalign_dagster.segments import SegmentKind
from textalign_dagster.settings import Settings

AMENDED = ("cut", "critiques", "shepherd")
"""Formats that can contain amended versions of their responses."""


class Offline(Settings):
    """Training data from a file, instead of samples of the policy."""

    path: str = Field(
        ...,
        min_length=1,
        description="A file of prompts with responses, judged or not; relative to the experiment file.",
    )
    format: Literal[
        "preferences",
        "plain",
        "alt",
        "cut",
        "critiques",
        "shepherd",
        "sparse_ratings",
        "sparse_rankings",
        "corpus",
    ] = Field(
        "preferences",
        description="As in `textalign import`: preferences (TRL, HH, SHP, UltraFeedback, HALOs), plain, alt, cut, critiques "
        "(OpenAI), shepherd, sparse_ratings or sparse_rankings; or corpus: documents, which are trained on in blocks.",
    )
    segments: SegmentKind = Field(
        "sentence",
        description="The unit of a corpus that is scored: each sentence, each line, or the whole document.",
    )
    shard: int = Field(
        1000,
        ge=1,
        description="Documents per shard of a corpus; shards are drawn as a whole, and prompts.per_iteration counts them.",
    )
    aspect: str | None = Field(None, description="The aspect to use from a file with several.")
    refinements: bool = Field(
        False,
        description="Whether the amended responses in a file of judgments are responses, too, each better than the one "
        "that it amends.",
    )
    held_out: int | None = Field(
        None,
        ge=1,
        description="Number of the file's prompts, chosen by a hash of their text, that are not trained on: the policy is "
        "evaluated on them, and a reward model on their responses. null: none; the evaluation uses the task's prompts.",
    )
    skip_refused: bool = Field(
        False, description="Continue with the valid rows of a file if others cannot be read."
    )

    @property
    def reading(self) -> dict[str, Any]:
        """The settings that determine how the file is read, as JSON, without its location."""
        unused = set() if self.format == "corpus" else {"segments", "shard"}
        if not self.refinements:  # the key from before this setting existed
            unused.add("refinements")
        return self.model_dump(mode="json", exclude={"path"} | unused)

    @model_validator(mode="after")
    def _corpus(self) -> Offline:
        for field in ("aspect", "held_out"):
            if self.format == "corpus" and getattr(self, field) is not None:
                raise ValueError(f"{field}: a corpus has none; remove it")
        if self.refinements and self.format not in AMENDED:
            raise ValueError(
                f"refinements: only files of judgments have amended responses (format: {', '.join(AMENDED)}); remove it"
            )
        return self
