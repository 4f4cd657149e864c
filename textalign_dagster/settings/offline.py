"""Responses and judgements from a file: the section ``offline`` of an experiment."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from textalign_dagster.settings import Settings


class Offline(Settings):
    """What is trained on comes from a file, in place of samples of the policy."""

    path: str = Field(
        ...,
        min_length=1,
        description="A file of prompts with responses, judged or not; relative to the experiment file.",
    )
    format: Literal["preferences", "plain", "alt", "cut", "sparse_ratings", "sparse_rankings"] = Field(
        "preferences",
        description="As in `textalign import`: preferences (TRL, HH, SHP, UltraFeedback, HALOs), plain, alt, cut, "
        "sparse_ratings or sparse_rankings.",
    )
    aspect: str | None = Field(None, description="Of a file with several aspects, the one that counts.")
    held_out: int | None = Field(
        None,
        ge=1,
        description="So many of the file's prompts, chosen by a hash of their text, are not trained on: the policy is "
        "evaluated on them, and a reward model on their responses. null: none; the evaluation has the task's prompts.",
    )
    skip_refused: bool = Field(
        False, description="Go on with the good rows of a file although others cannot be read."
    )

    @property
    def reading(self) -> dict[str, Any]:
        """The settings that decide how the file is read, as JSON; not where it lies."""
        return self.model_dump(mode="json", exclude={"path"})
