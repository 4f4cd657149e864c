"""Maximum likelihood: every text is trained on, whatever its feedback."""

from __future__ import annotations

from typing import Literal

from textalign_dagster.methods.no_feedback import NoFeedback


class MLE(NoFeedback):
    """The baseline on a corpus (Korbak et al. 2023): every document, without feedback."""

    name: Literal["mle"] = "mle"  # type: ignore[assignment]

    @property
    def buckets(self) -> tuple[str, ...]:
        return ("text",)
