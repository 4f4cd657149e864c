"""Objectives: one module each, and one line each here. From outside: this registry, and `base`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from training.objectives.awr import AWR
from training.objectives.bradley_terry import BradleyTerry
from training.objectives.cut import CUT
from training.objectives.dpo import DPO
from training.objectives.grpo import GRPO
from training.objectives.ipo import IPO
from training.objectives.kto import KTO
from training.objectives.nll import NLL
from training.objectives.rating import Rating
from training.objectives.rloo import RLOO
from training.objectives.simpo import SimPO
from training.objectives.unlikelihood import Unlikelihood

AnyObjective = Annotated[
    NLL | AWR | BradleyTerry | CUT | DPO | GRPO | IPO | KTO | Rating | RLOO | SimPO | Unlikelihood,
    Field(discriminator="name"),
]

__all__ = [
    "AWR",
    "CUT",
    "DPO",
    "GRPO",
    "IPO",
    "KTO",
    "NLL",
    "RLOO",
    "AnyObjective",
    "BradleyTerry",
    "Rating",
    "SimPO",
    "Unlikelihood",
]
