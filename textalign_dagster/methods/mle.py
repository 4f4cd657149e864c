"""Maximum likelihood: every text is trained on, whatever feedback says of it."""

from __future__ import annotations

from typing import Literal

from textalign_dagster.methods.no_feedback import NoFeedback


class MLE(NoFeedback):
    """What learning from feedback is compared with on a corpus (Korbak et al. 2023); nobody is asked for any."""

    name: Literal["mle"] = "mle"  # type: ignore[assignment]

    @property
    def buckets(self) -> tuple[str, ...]:
        return ("text",)
