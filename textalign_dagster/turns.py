"""Dialogues as messages: transcripts are parsed once, when a source is loaded, and never split again.

In the transcripts of Anthropic's HH a turn begins with ``Human:`` or ``Assistant:``. Such a word is
a marker only at the start of the transcript, or of a line after a blank one; anywhere else
(``He said: Assistant: hello``) it is part of the text. In this format, a text with such a word in a
marker's position cannot be distinguished from a turn; sources with ``messages`` do not have this problem.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]

NAMES: dict[Role, str] = {"user": "Human", "assistant": "Assistant"}
"""The names of the roles in a transcript."""

CUE = f"{NAMES['assistant']}:"
"""The end of a transcript: the policy continues from here."""

_ROLES: dict[str, Role] = {name: role for role, name in NAMES.items()}
_MARKER = re.compile(r"(?:\A|(?<=\n\n))(Human|Assistant):(?=\s|\Z)")


class BadDialogue(ValueError):
    """A row of a source is not a dialogue; the message is shown with a count and an example."""


@dataclass(frozen=True)
class Message:
    """A turn: the speaker's role, and the text without surrounding whitespace."""

    role: Role
    content: str


Dialogue = tuple[Message, ...]


def parse_transcript(text: str) -> Dialogue:
    """The turns of ``Human: …\\n\\nAssistant: …``; the last may be blank (the cue to answer).

    Raises:
        BadDialogue: the text does not begin with a marker, or a turn before the last is blank.
    """
    text = text.replace("\r\n", "\n").lstrip()
    markers = list(_MARKER.finditer(text))
    if not markers or markers[0].start() > 0:
        raise BadDialogue("does not begin with `Human:` or `Assistant:`")
    ends = [*(marker.start() for marker in markers[1:]), len(text)]
    turns = tuple(
        Message(_ROLES[marker[1]], text[marker.end() : end].strip())
        for marker, end in zip(markers, ends, strict=True)
    )
    if not all(turn.content for turn in turns[:-1]):
        raise BadDialogue("a turn is blank")
    return turns


def transcript(turns: Dialogue) -> str:
    """``Human: …``, blank line, ``Assistant: …``, …, ending with the cue.

    There is no blank line before the first turn: published prompts were stripped before a condition was
    prepended, and the condition's template adds its own blank line.

    Raises:
        BadDialogue: there is a system message, for which the format has no name.
    """
    if turns[0].role == "system":
        raise BadDialogue("a system message, which transcripts cannot hold (`format: chat_template` can)")
    return "\n\n".join([*(f"{NAMES[turn.role]}: {turn.content}" for turn in turns), CUE])


def parse_messages(value: Any) -> Dialogue:
    """The turns of a list of ``{"role", "content"}``.

    Raises:
        BadDialogue: not such a list, an unknown role, a blank turn, a system message after the first.
    """
    if not isinstance(value, list) or not value:
        raise BadDialogue("not a list of messages")
    turns: list[Message] = []
    for item in value:
        if not isinstance(item, dict) or not isinstance(item.get("content"), str):
            raise BadDialogue("a message has no text in `content`")
        role = item.get("role")
        if role not in ("system", "user", "assistant"):
            raise BadDialogue(f"a message has the role {role!r}; it must be system, user or assistant")
        if role == "system" and turns:
            raise BadDialogue("a system message comes after another message")
        if not item["content"].strip():
            raise BadDialogue("a turn is blank")
        turns.append(Message(role, item["content"].strip()))
    return tuple(turns)


def split_answer(turns: Dialogue) -> tuple[Dialogue, str | None]:
    """The turns that a policy is shown, and the source's answer to them (None: none).

    Raises:
        BadDialogue: there is no user turn to answer.
    """
    shown, answer = turns, None
    if turns and turns[-1].role == "assistant":
        shown, answer = turns[:-1], turns[-1].content or None
    if not shown or shown[-1].role != "user" or not shown[-1].content:
        raise BadDialogue("no user turn to answer")
    return shown, answer


def drop_oldest(turns: Dialogue) -> Dialogue | None:
    """The dialogue without its oldest turns, up to the next user turn; None: there is no other.

    A system message is kept.
    """
    system = turns[: turns[0].role == "system"]
    rest = turns[len(system) :]
    later = next((i for i, turn in enumerate(rest) if i > 0 and turn.role == "user"), None)
    return None if later is None else (*system, *rest[later:])


def alternating(turns: Sequence[Message]) -> list[Message]:
    """Merges consecutive turns of the same role into one, with a blank line between them."""
    return [
        Message(role, "\n\n".join(turn.content for turn in several))
        for role, several in groupby(turns, lambda turn: turn.role)
    ]


def runs_on(text: str) -> bool:
    """Whether an answer continues into another turn that the policy made up."""
    return any(marker.start() > 0 for marker in _MARKER.finditer(text))
