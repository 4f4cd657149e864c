"""Reward models: the loop does not train a policy, but a model that judges the policy's samples."""

from __future__ import annotations

from typing import ClassVar, Literal

import polars as pl
from pydantic import Field, field_validator

from textalign_dagster.methods.base import Paired, Rewarded


class RatingRewardModel(Rewarded):
    """Regression on ratings (Bansal et al. 2024)."""

    objectives: ClassVar[tuple[str, ...]] = ("rating",)
    trains: ClassVar[Literal["policy", "reward model"]] = "reward model"

    name: Literal["rm_ratings"] = "rm_ratings"
    scale: tuple[float, float] | None = Field(
        None,
        strict=False,
        description="The lowest and the highest rating, e.g. [1, 7]; ratings outside are clipped. null: the "
        "range of the drawn samples.",
    )

    @field_validator("scale")
    @classmethod
    def _rising(cls, scale: tuple[float, float] | None) -> tuple[float, float] | None:
        if scale is not None and not scale[0] < scale[1]:
            raise ValueError(f"{list(scale)}: give the lowest rating first, then a higher one")
        return scale

    def examples(self, rows: pl.DataFrame) -> pl.DataFrame:
        """The ratings, scaled to 0 to 1, as ``reward``."""
        rated, value = self.rewarded(rows), pl.col("value")
        low, high = (value.min(), value.max()) if self.scale is None else map(pl.lit, self.scale)
        if self.scale is None and rated["value"].n_unique() < 2:
            return super().examples(rated.clear())  # nothing to tell apart
        return super().examples(rated.with_columns(value=((value - low) / (high - low)).clip(0, 1)))


class RankingRewardModel(Paired):
    """Pairs of a prompt's samples, the better one chosen (Bradley-Terry).

    The pairs are the rankings of a judge that ranks, or follow from the ratings of one that rates.
    """

    objectives: ClassVar[tuple[str, ...]] = ("bradley_terry",)
    trains: ClassVar[Literal["policy", "reward model"]] = "reward model"

    name: Literal["rm_rankings"] = "rm_rankings"
    pairs_per_prompt: int | None = Field(
        None,
        ge=1,
        description="Maximum number of pairs per prompt: the best with the worst sample, the second best with the "
        "second worst, …; null: all.",
    )


class RatedPairsRewardModel(RankingRewardModel):
    """Ratings turned into pairs: the data of `rm_ratings` with the loss of `rm_rankings`.

    Compared with these two, it separates the effect of the protocol from that of the loss.
    """

    name: Literal["rm_rated_pairs"] = "rm_rated_pairs"  # type: ignore[assignment]
    pairs_from: Literal["rewards"] = "rewards"
