"""The methods: one module each, one line each here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from textalign_dagster.methods.alt_lmc import AltLMC
from textalign_dagster.methods.alt_lmu import AltLMU
from textalign_dagster.methods.base import FeedbackKind, Method
from textalign_dagster.methods.dpo import DPO
from textalign_dagster.methods.no_feedback import NoFeedback
from textalign_dagster.methods.quantile import AltRM, Quark
from textalign_dagster.methods.steerlm import SteerLM
from textalign_dagster.methods.unlikelihood import Unlikelihood

AnyMethod = Annotated[
    AltLMC | AltLMU | AltRM | Quark | SteerLM | NoFeedback | DPO | Unlikelihood, Field(discriminator="name")
]

METHODS: dict[str, type[Method]] = {
    method.model_fields["name"].default: method
    for method in (AltLMC, AltLMU, AltRM, Quark, SteerLM, NoFeedback, DPO, Unlikelihood)
}
"""Every method by its name."""

__all__ = [
    "DPO",
    "METHODS",
    "AltLMC",
    "AltLMU",
    "AltRM",
    "AnyMethod",
    "FeedbackKind",
    "Method",
    "NoFeedback",
    "Quark",
    "SteerLM",
    "Unlikelihood",
]
