"""How a dialogue is rendered for a policy: by a writer, e.g. as a transcript or by a chat template."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from textalign_dagster.turns import Dialogue

Writer = Callable[[Dialogue], str]


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template's source.

    Attributes:
        where: its name in errors.
        end: the text of the model's end token; None: unknown, as for a template in a separate file.
    """

    source: str
    where: str
    end: str | None = None
