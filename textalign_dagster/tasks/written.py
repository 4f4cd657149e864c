"""How a dialogue is written for a policy: by a writer, e.g. as a transcript or by a chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from textalign_dagster.turns import Dialogue

Writer = Callable[[Dialogue], str]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template's source.

    Attributes:
        where: what it is called in errors.
        end: the text of the model's end token; None: not known, as of a template that is a file of its own.
    """

    source: str
    where: str
    end: str | None = None
