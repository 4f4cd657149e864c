"""The methods: one module each, one entry each in `AnyMethod`."""

from __future__ import annotations

from typing import Annotated, get_args

from pydantic import Field

from textalign_dagster.methods.alt_lmc import AltLMC
from textalign_dagster.methods.alt_lmu import AltLMU
from textalign_dagster.methods.awr import AWR
from textalign_dagster.methods.base import FeedbackKind, Method
from textalign_dagster.methods.conditional import CSFT, ConditionalTraining
from textalign_dagster.methods.cut import CUT
from textalign_dagster.methods.dpo import DPO
from textalign_dagster.methods.filtering import RWR, Filtering
from textalign_dagster.methods.forward_prediction import ForwardPrediction
from textalign_dagster.methods.grpo import GRPO
from textalign_dagster.methods.kto import KTO
from textalign_dagster.methods.mle import MLE
from textalign_dagster.methods.no_feedback import NoFeedback
from textalign_dagster.methods.quantile import AltRM, Quark
from textalign_dagster.methods.reward_models import (
    RankingRewardModel,
    RatedPairsRewardModel,
    RatingRewardModel,
)
from textalign_dagster.methods.sft import SFT
from textalign_dagster.methods.steerlm import SteerLM
from textalign_dagster.methods.unlikelihood import Unlikelihood

AnyMethod = Annotated[
    AltLMC
    | AltLMU
    | AltRM
    | Quark
    | SteerLM
    | NoFeedback
    | CUT
    | ForwardPrediction
    | DPO
    | Unlikelihood
    | AWR
    | MLE
    | KTO
    | GRPO
    | SFT
    | CSFT
    | RatingRewardModel
    | RankingRewardModel
    | RatedPairsRewardModel
    | Filtering
    | RWR
    | ConditionalTraining,
    Field(discriminator="name"),
]

METHODS: dict[str, type[Method]] = {
    method.model_fields["name"].default: method for method in get_args(get_args(AnyMethod)[0])
}
"""Name → method."""

__all__ = [
    "AWR",
    "CSFT",
    "CUT",
    "DPO",
    "GRPO",
    "KTO",
    "METHODS",
    "MLE",
    "RWR",
    "SFT",
    "AltLMC",
    "AltLMU",
    "AltRM",
    "AnyMethod",
    "ConditionalTraining",
    "FeedbackKind",
    "Filtering",
    "ForwardPrediction",
    "Method",
    "NoFeedback",
    "Quark",
    "RankingRewardModel",
    "RatedPairsRewardModel",
    "RatingRewardModel",
    "SteerLM",
    "Unlikelihood",
]
