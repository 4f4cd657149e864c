"""The methods: one module each, one line each here."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from textalign_dagster.methods.alt_lmc import AltLMC
from textalign_dagster.methods.alt_lmu import AltLMU
from textalign_dagster.methods.base import FeedbackKind, Method
from textalign_dagster.methods.no_feedback import NoFeedback
from textalign_dagster.methods.quantile import AltRM, Quark

AnyMethod = Annotated[AltLMC | AltLMU | AltRM | Quark | NoFeedback, Field(discriminator="name")]

__all__ = ["AltLMC", "AltLMU", "AltRM", "AnyMethod", "FeedbackKind", "Method", "NoFeedback", "Quark"]
