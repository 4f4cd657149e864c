"""Finding an answer in a reply: reasoning blocks, JSON within other text, labelled lines."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

_MOST_ATTEMPTS = 200  # a reply of nothing but braces must not cost quadratic time
_CLOSING = re.compile(r"</(?:think|thinking|reasoning)>", re.IGNORECASE)
_OPENING = re.compile(r"\s*<(?:think|thinking|reasoning)>", re.IGNORECASE)
_FINAL_CHANNEL = re.compile(r"<\|channel\|>\s*final\s*<\|message\|>")
_JSON_OBJECT = re.compile(r'\{\s*["}]')
# Strings are matched first, so commas inside them stay.
# An unclosed one runs to the end, so no start is tried twice.
_TRAILING_COMMA = re.compile(r'("(?:[^"\\]|\\.)*(?:"|\Z))|,(?=\s*[}\]])', re.DOTALL)
_FENCE_LINE = re.compile(r"^[ \t]*```[A-Za-z]*[ \t]*$", re.MULTILINE)


class Unreadable(Exception):
    """Why a reply cannot be used; becomes a verdict's reason."""


@dataclass(frozen=True)
class Found:
    """The JSON objects found in a reply.

    Attributes:
        objects: JSON objects on their own lines, or at the start or end of the reply. One inside a
            sentence is a quotation, most likely of the text judged.
        alone: whether all of them are on their own lines.
        rest: the text around them.
        broken: whether something begins like a JSON object but is not valid JSON.
    """

    objects: list[dict[str, Any]]
    alone: bool
    rest: str
    broken: bool


def find_json(text: str) -> Found:
    """The complete outermost JSON objects of a text; trailing commas are tolerated.

    An object inside one that is cut off or broken is ignored: it is only part of an answer.

    Raises:
        Unreadable: an object names a field twice.
    """
    whole = _loads(text)
    if isinstance(whole, dict):
        return Found([whole], True, "", False)
    objects: list[dict[str, Any]] = []
    rest: list[str] = []
    position, broken, alone = 0, False, True
    for _ in range(_MOST_ATTEMPTS):
        start = _JSON_OBJECT.search(text, position)
        if start is None:
            break
        rest.append(text[position : start.start()])
        end = _closing_brace(text, start.start())
        value = _loads(text[start.start() : end]) if end is not None else None
        if isinstance(value, dict) and end is not None:
            own_lines = _on_own_lines(text, start.start(), end)
            if own_lines or _at_edge(text, start.start(), end):
                objects.append(value)
                alone = alone and own_lines
        else:
            broken = True
        position = len(text) if end is None else end
    rest.append(text[position:])
    return Found(objects, alone, _FENCE_LINE.sub("", "".join(rest)).strip(), broken)


def begins_with_object(text: str) -> bool:
    """Whether a reply begins like a JSON object, with or without a code fence."""
    return re.match(r"\s*(?:```[A-Za-z]*\s*)?\{", text) is not None


def strip_reasoning(text: str) -> str | None:
    """The reply after its reasoning block; None: the block never ends.

    Chat templates may open the block themselves, so a closing tag alone ends it too. The last one
    counts: reasoning may quote a text that contains such tags.
    """
    channels = list(_FINAL_CHANNEL.finditer(text))
    if channels:
        text = text[channels[-1].end() :].partition("<|")[0]
    if _is_object(text):
        return text  # an answer in the requested form; tags in it are quoted
    closings = list(_CLOSING.finditer(text))
    if closings:
        return text[closings[-1].end() :].strip()
    return None if _OPENING.match(text) else text.strip()


def labelled(text: str, names: Iterable[str]) -> dict[str, list[str]]:
    """Contents of ``Name: content`` parts of a text, by lower-case name.

    Names count at the start of lines (after list markers, ``#`` and ``*``); a name that starts no line
    counts anywhere, if it occurs only once. A part ends where the next one begins.
    """
    names = list(names)
    alternatives = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    at_start = re.compile(
        rf"^[ \t>#*_\-•0-9.)(]{{0,20}}({alternatives})[ \t*_]{{0,8}}[:=：]", re.IGNORECASE | re.MULTILINE
    )
    anywhere = re.compile(rf"(?<![\w\"'])({alternatives})[ \t*_]{{0,8}}[:=：]", re.IGNORECASE)
    marks = list(at_start.finditer(text))
    seen = {mark[1].lower() for mark in marks}
    inside = [mark for mark in anywhere.finditer(text) if mark[1].lower() not in seen]
    for name in {mark[1].lower() for mark in inside}:
        same = [mark for mark in inside if mark[1].lower() == name]
        if len(same) == 1:
            marks += same
    marks.sort(key=lambda mark: mark.start())
    parts: dict[str, list[str]] = {}
    for mark, following in zip(marks, [*marks[1:], None], strict=False):
        content = text[mark.end() : following.start() if following else len(text)]
        parts.setdefault(mark[1].lower(), []).append(content.strip(" \t\r\n*_"))
    return parts


def _on_own_lines(text: str, start: int, end: int) -> bool:
    before, after = text[:start].rpartition("\n")[2], text[end:].partition("\n")[0]
    return not before.strip(" \t`") and not after.strip(" \t`.,;")


def _at_edge(text: str, start: int, end: int) -> bool:
    before, after = _FENCE_LINE.sub("", text[:start]), _FENCE_LINE.sub("", text[end:])
    return not before.strip() or not after.strip(" \t\r\n`.")


def _loads(text: str) -> Any:
    """The JSON value of a text, or None if it is not JSON (JSON's own null has no use here)."""
    for attempt in (text, _TRAILING_COMMA.sub(lambda m: m[1] or "", text)):
        try:
            # strict=False: line breaks inside strings are a common slip.
            return json.loads(attempt, strict=False, object_pairs_hook=_unique, parse_constant=_not_json)
        except (ValueError, RecursionError):
            pass
    return None


def _is_object(text: str) -> bool:
    try:
        return isinstance(_loads(text), dict)
    except Unreadable:
        return True  # an object that gives a field twice


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise Unreadable(f"the answer gives {name!r} twice")
        fields[name] = value
    return fields


def _not_json(constant: str) -> Any:
    raise ValueError(f"{constant} is not JSON")


def _closing_brace(text: str, start: int) -> int | None:
    """Index after the brace that closes the one at ``start``; None: it is never closed."""
    depth, position, in_string = 0, start, False
    while position < len(text):
        character = text[position]
        if character == "\\" and in_string:
            position += 1
        elif character == '"':
            in_string = not in_string
        elif not in_string and character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return position + 1
        position += 1
    return None
