"""How a dialogue is written for a policy: as a transcript, here; by a chat template, in `chat_template`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from textalign_dagster.tasks.dialogue.turns import NAMES, BadDialogue, Dialogue

CUE = f"{NAMES['assistant']}:"
"""What a transcript ends with: the policy goes on from here."""

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


def transcript(turns: Dialogue) -> str:
    """``Human: …``, blank line, ``Assistant: …``, …, ending with the cue.

    Without blank lines before the first turn: published prompts were stripped before a condition was
    put in front, and the condition's template brings its own blank line.

    Raises:
        BadDialogue: a system message, for which the format has no name.
    """
    if turns[0].role == "system":
        raise BadDialogue("a system message, which transcripts cannot hold (`format: chat_template` can)")
    return "\n\n".join([*(f"{NAMES[turn.role]}: {turn.content}" for turn in turns), CUE])
