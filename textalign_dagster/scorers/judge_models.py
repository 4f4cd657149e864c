"""Your own language model as the judge: it reads a sample and writes what is wrong with it (no torch here)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field

from textalign_dagster.ids import content_hash
from textalign_dagster.methods import FeedbackKind
from textalign_dagster.scorers.base import Scorer, trained_by
from textalign_dagster.scorers.file_stamps import model_identity

JUDGE_MODELS_VERSION = "1"
"""Raised with every change to what a model is shown or how its judgment is parsed."""


class JudgeModel(Scorer):
    """What the model writes after prompt, sample and question is the judgment; decoding is greedy.

    It runs in the engine that samples the policy, so it needs no server. Xu et al. (2024, arXiv:2312.14591,
    section 4.4) train such a judge from the target model itself.
    """

    measures: ClassVar[bool] = False  # a judgment is text, not a number

    name: Literal["judge_model"] = "judge_model"
    model: str = Field(
        ...,
        min_length=1,
        description="EXPERIMENT@ITERATION (trained by an experiment with method `forward_prediction`), a "
        "transformers folder (relative to the experiment file), or a hub id.",
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    question: str = Field(
        "\nJudgment: ",
        min_length=1,
        description="Text between a sample and its judgment, as in its training (`method.question`).",
    )
    max_new_tokens: int = Field(
        128, ge=1, description="Longest judgment in tokens; one that is cut off is unparseable."
    )

    @property
    def trained(self) -> tuple[str, int] | None:
        return trained_by(self.model)

    @property
    def kinds(self) -> tuple[FeedbackKind, ...]:
        return ("judgment",)

    @property
    def better(self) -> Literal["lower", "higher"]:
        return "higher"

    @property
    def version(self) -> str:
        return f"{JUDGE_MODELS_VERSION}+{content_hash(self.identity)[:8]}"

    @property
    def identity(self) -> dict[str, Any]:
        kept = self.model_dump(mode="json", exclude={"model", "revision"})
        return {**kept, **model_identity("model", self.model, self.revision), "reader": JUDGE_MODELS_VERSION}
