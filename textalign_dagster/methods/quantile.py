"""Methods that condition on the quantile of a reward: Quark and ALT_RM."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from textalign_dagster.methods.base import ClosedConditional, FeedbackKind
from textalign_dagster.pool.quantiles import QuantileSettings


class QuantileMethod(ClosedConditional):
    """Rewards → quantiles → one condition per quantile."""

    quantiles: QuantileSettings = Field(QuantileSettings(), description="How rewards are cut into quantiles.")

    @property
    def ranking(self) -> QuantileSettings:
        return self.quantiles

    @property
    def wants(self) -> FeedbackKind:
        return "reward"


class Quark(QuantileMethod):
    """Quantile reward conditioning with one new token per quantile (Lu et al. 2022)."""

    name: Literal["quark"] = "quark"
    template: str = Field("{condition}{prompt}", description="How a quantile token is prepended to a prompt.")
    count: int = Field(5, ge=2, le=100, description="Number of quantiles, and of new tokens.")

    @property
    def buckets(self) -> tuple[str, ...]:
        return tuple(f"_QUANTILE_TOKEN_{i}_" for i in range(self.count))

    @property
    def special_tokens(self) -> tuple[str, ...]:
        return self.buckets


class AltRM(QuantileMethod):
    """A reward's quantile as a phrase (ALT_RM, Abadal Lloret et al. 2024)."""

    name: Literal["alt_rm"] = "alt_rm"
    template: str = Field("{condition} input: {prompt}", description="How a phrase is prepended to a prompt.")
    phrases: tuple[str, ...] = Field(
        ("Excellent.", "Good.", "Mediocre.", "Bad.", "Horrible."),
        strict=False,
        min_length=2,
        description="One phrase per quantile, best first; their number is the number of quantiles.",
    )

    @field_validator("phrases")
    @classmethod
    def _distinct(cls, phrases: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(phrases)) < len(phrases):
            raise ValueError("two quantiles have the same phrase; make them distinct")
        return phrases

    @property
    def buckets(self) -> tuple[str, ...]:
        return self.phrases
