"""From a row of a source to a prompt: the dialogue in it, shortened, as it is shown to the policy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from textalign_dagster.tasks.written import Writer
from textalign_dagster.turns import (
    BadDialogue,
    Dialogue,
    drop_oldest,
    parse_messages,
    parse_transcript,
    split_answer,
)


class Asked(NamedTuple):
    """A dialogue up to the turn to be answered, and the source's answer, if it has one."""

    turns: Dialogue
    answer: str | None


def dialogue_of(row: Mapping[str, Any]) -> Asked:
    """The dialogue of a row, in any of three forms:

    * ``messages``: a list of ``{"role", "content"}``; if the last is the assistant's, it is the answer;
    * ``prompt``: a transcript that ends with ``Assistant:``, and the answer in ``chosen`` or ``reference``,
      alone or after the prompt;
    * ``chosen``: a whole transcript, as in HH; its last turn is the answer (``rejected`` is not read).

    Raises:
        BadDialogue: there is no valid one.
    """
    if row.get("messages") is not None:
        return Asked(*split_answer(parse_messages(row["messages"])))
    prompt, chosen = row.get("prompt"), row.get("chosen")
    if isinstance(prompt, str):
        turns = parse_transcript(prompt)
        if turns[-1].role != "assistant" or turns[-1].content:
            raise BadDialogue("the prompt does not end with `Assistant:`")
        answer = chosen if chosen is not None else row.get("reference")
        if answer is not None and not isinstance(answer, str):
            raise BadDialogue("the answer is not text")
        return Asked(split_answer(turns)[0], (answer or "").removeprefix(prompt).strip() or None)
    if not isinstance(chosen, str):
        raise BadDialogue("no dialogue in `messages`, `prompt` or `chosen`")
    turns = parse_transcript(chosen)
    if turns[-1].role != "assistant":
        raise BadDialogue("`chosen` does not end with the assistant's turn")
    return Asked(*split_answer(turns))


def shortened(turns: Dialogue, write: Writer, max_turns: int | None, max_characters: int | None) -> str:
    """The rendered dialogue, without its oldest turns if it is too long.

    Whole turns are dropped, oldest first, and the rest begins with a human turn. The last turn, and the
    cue after it, are never changed.

    Raises:
        BadDialogue: the last turn alone is too long.
    """
    while True:
        text = write(turns)
        spoken = sum(turn.role != "system" for turn in turns)
        too_many = max_turns is not None and spoken > max_turns
        if not too_many and (max_characters is None or len(text) <= max_characters):
            return text
        shorter = drop_oldest(turns)
        if shorter is None:
            raise BadDialogue(f"its last turn alone is longer than {max_characters} characters")
        turns = shorter
