"""Checks whether a structure can be compiled, with the libraries that the engine uses. They import torch."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any


def refusal(structure: Mapping[str, Any]) -> str | None:
    """Why a structure (`textalign_dagster.settings.structured.content_of`) is refused; None: no fault found.

    Without these libraries nothing is checked here; the engine checks it when it runs.
    """
    ((kind, content),) = structure.items()
    if kind == "json_schema" and importlib.util.find_spec("jsonschema") is not None:
        why = _schema_refusal(content)
        if why is not None:
            return why
    if importlib.util.find_spec("xgrammar") is None or kind == "choice":
        return None
    from xgrammar import Grammar

    parsers: dict[str, Callable[[Any], object]] = {
        "regex": Grammar.from_regex,
        "json_schema": Grammar.from_json_schema,
        "grammar": Grammar.from_ebnf,
    }
    try:
        parsers[kind](content)
    except (RuntimeError, ValueError) as error:
        # The message begins with a timestamp and a source location.
        return " ".join(str(error).split()).rpartition("cpp:")[2].partition(": ")[2] or str(error)
    return None


def _schema_refusal(schema: Any) -> str | None:
    import jsonschema

    try:
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        place = "/".join(map(str, error.absolute_path))
        return f"{place + ': ' if place else ''}{error.message}"
    return None
