"""Preference pairs from rewards, for DPO and its relatives (Rafailov et al. 2023)."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from textalign_dagster.methods.base import Paired


class DPO(Paired):
    """Pairs of a prompt's samples: the one with the higher reward is chosen, the other rejected."""

    objectives: ClassVar[tuple[str, ...]] = ("dpo", "ipo", "simpo")

    name: Literal["dpo"] = "dpo"
    pairs_per_prompt: int = Field(
        1,
        ge=1,
        description="Maximum number of pairs per prompt: the best with the worst sample, the second best with "
        "the second worst, …",
    )
