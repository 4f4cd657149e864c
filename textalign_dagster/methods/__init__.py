"""The methods: one module each, one line each here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from textalign_dagster.methods.alt_lmc import AltLMC
from textalign_dagster.methods.alt_lmu import AltLMU
from textalign_dagster.methods.base import FeedbackKind, Method
from textalign_dagster.methods.no_feedback import NoFeedback
from textalign_dagster.methods.quantile import AltRM, Quark
from textalign_dagster.methods.steerlm import SteerLM

AnyMethod = Annotated[AltLMC | AltLMU | AltRM | Quark | SteerLM | NoFeedback, Field(discriminator="name")]

__all__ = [
    "AltLMC",
    "AltLMU",
    "AltRM",
    "AnyMethod",
    "FeedbackKind",
    "Method",
    "NoFeedback",
    "Quark",
    "SteerLM",
]
