"""Settings of the datapool: which earlier samples stay in it, and how training samples are drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

from pydantic import Field, model_validator

from textalign_dagster.settings import Settings


class PoolSettings(Settings):
    """The datapool of one iteration. The defaults are those of the published configurations.

    Samples are drawn from every group (a prompt, or the whole pool) in exactly one of three ways:

    * ``samples_per_bucket``: that many of every label (ALT_RM and Quark: 2 of each of 5 quantiles);
    * ``samples``: that many in total, in equal or given shares, with shortfalls of a label filled
      from the others (ALT_LMU and ALT_LMC: 8 over 4 labels);
    * neither: everything that has a label.
    """

    drop_factor: float = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        description="Share of the earlier samples dropped from the pool at every iteration: 0 keeps "
        "all, 1 (published configurations) trains on the current iteration only, f keeps "
        "int(n * (1 - f)) random ones of every group.",
    )
    drop_by: Literal["group", "group_and_label"] = Field(
        default="group",
        description="Whether drop_factor counts n per group (published for ALT_LMU and ALT_LMC) or "
        "per group and label (published for ALT_RM and Quark).",
    )
    per: Literal["prompt", "pool"] = Field(
        default="prompt",
        description="The group within which draws are balanced: every prompt, or the whole pool.",
    )
    samples_per_bucket: int | None = Field(
        default=None,
        ge=1,
        description="Samples to draw per label and group (published: 2).",
    )
    samples: int | None = Field(
        default=None,
        ge=1,
        description="Samples to draw per group, over all labels (published: 8).",
    )
    shares: dict[str, float] | None = Field(
        default=None,
        description="With samples: the weight of every label, e.g. {'no issue': 0.5, 'style': 0.5} "
        "(0 if not named); quotas are rounded by largest remainder. Without it every label gets "
        "samples // K and the rest is left to `fill` (published).",
    )
    max_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Samples of this many tokens or more are over-long (cut off): drawn only when "
        "shorter ones of the same label run out. Unset: the sampling limit max_new_tokens.",
    )
    weights: str | None = Field(
        default=None,
        description="The weights of samples in the objective: an SQL query over the tables for sample_id and weight "
        "(0: not trained on; other samples have weight 1). A pair's weight is the product of its samples' weights.",
    )
    fill: Literal["insertion", "shuffled", "none"] = Field(
        default="insertion",
        description="With samples: what fills shortfalls of labels: unused samples of any label and "
        "length in insertion order (published), in random order, or nothing.",
    )

    @model_validator(mode="after")
    def _no_setting_is_ignored(self) -> PoolSettings:
        if self.samples is not None and self.samples_per_bucket is not None:
            raise ValueError("samples and samples_per_bucket are mutually exclusive: give one of them")
        if self.samples is None:
            if self.shares is not None:
                raise ValueError("shares weighs the labels of samples: give samples as well")
            if self.fill != "insertion":
                raise ValueError(f"fill={self.fill!r} acts on samples only: give samples as well")
        if self.shares is not None:
            bad = {k: v for k, v in self.shares.items() if not math.isfinite(v) or v < 0}
            if bad or not sum(self.shares.values()) > 0:
                raise ValueError(f"shares: finite, not negative and not all 0; got {self.shares}")
        return self

    @property
    def draws_all(self) -> bool:
        """Whether nothing limits the draw."""
        return self.samples is None and self.samples_per_bucket is None

    def length_limit(self, sampling_limit: int | None) -> int:
        """Number of tokens from which a sample is over-long.

        Raises:
            ValueError: neither ``max_tokens`` nor a sampling limit is known.
        """
        limit = sampling_limit if self.max_tokens is None else self.max_tokens
        if limit is None:
            raise ValueError(
                "max_tokens is unset and no sampling limit is known: set max_tokens "
                "(a very large number draws without regard to length)"
            )
        return limit

    def quotas(self, labels: Sequence[str]) -> list[int]:
        """Samples to draw of every label in one group, before any fill; length K.

        Raises:
            ValueError: nothing limits the draw, there are no labels, or shares names other labels.
        """
        if self.draws_all or not labels:
            raise ValueError("samples or samples_per_bucket, and at least one label, are needed")
        if self.samples_per_bucket is not None:
            return [self.samples_per_bucket] * len(labels)
        assert self.samples is not None
        if self.shares is None:
            return [self.samples // len(labels)] * len(labels)
        unknown = sorted(set(self.shares) - set(labels))
        if unknown:
            raise ValueError(f"shares: {unknown} are not among the pool's labels {list(labels)}")
        weights = [self.shares.get(label, 0.0) for label in labels]
        return largest_remainder(self.samples, weights)


def largest_remainder(total: int, weights: Sequence[float]) -> list[int]:
    """``total`` apportioned in proportion to weights (Hamilton's method); ties go to the first.

    Weights are taken as the decimals they print as, so 0.1 is exactly a tenth and rounding never
    decides a seat.
    """
    exact = [Fraction(str(w)) for w in weights]
    ideal = [total * w / sum(exact) for w in exact]
    seats = [int(x) for x in ideal]
    by_remainder = sorted(range(len(seats)), key=lambda i: (seats[i] - ideal[i], i))
    for i in by_remainder[: total - sum(seats)]:
        seats[i] += 1
    return seats
