"""Records of JSON files with the line each begins on: a list of objects, or one object per line (JSON Lines)."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from textalign_dagster.settings import SettingsError


def json_list(text: str, path: Path) -> Iterator[tuple[int, Any]]:
    """(line, value) of every element of a JSON list, or of every line of JSON Lines.

    Raises:
        SettingsError: the list is not valid JSON; names line and column.
    """
    if not text.lstrip().startswith("["):
        yield from json_lines(text)
        return
    try:
        elements = json.loads(text)
    except json.JSONDecodeError as error:
        raise SettingsError(f"{path}:{error.lineno}:{error.colno}: broken JSON: {error.msg}") from None
    except RecursionError:
        raise SettingsError(f"{path}: JSON nested too deeply") from None
    decoder, position, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    for element in elements:
        while text[position] in " \t\r\n,":
            position += 1
        line, counted = line + text.count("\n", counted, position), position
        yield line, element
        _, position = decoder.raw_decode(text, position)


def json_lines(text: str) -> Iterator[tuple[int, Any]]:
    """(line, value) of every line that is not blank; of one that is not JSON, the value is its text."""
    # Not splitlines: it would split at U+2028 too, which JSON allows inside a string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except (json.JSONDecodeError, RecursionError):
            yield number, line


def json_text(rows: Iterable[Any]) -> str:
    """The rows as JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
