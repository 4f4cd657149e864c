"""Structured output: the form of every completion, set by `sampling.structured`.

Settings contain a schema or name its file; samplers are passed its content (`content_of`), which is also
part of the samples' identity. Whether a grammar compiles is checked by the engine's own library
(`resources.engines.structure`).
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator, model_validator

from textalign_dagster.settings import Settings, SettingsError

WHERE = "sampling.structured"
KINDS = ("choice", "regex", "json_schema", "grammar")


class Structured(Settings):
    """The form of completions; exactly one field is given."""

    choice: list[str] | None = Field(
        None, description="A completion is one of these, e.g. ['yes', 'no'] (a leading space counts)."
    )
    regex: str | None = Field(None, description="A completion matches this as a whole, e.g. '[1-5]/5'.")
    json_schema: dict[str, Any] | str | None = Field(
        None,
        description="A completion is JSON that fits this schema: the schema itself, or a JSON file with it (relative "
        "to the experiment file).",
    )
    grammar: str | None = Field(
        None, description='A completion is a sentence of this grammar (EBNF, e.g. root ::= "a" | "b" root).'
    )

    @field_validator("choice")
    @classmethod
    def _different(cls, choice: list[str] | None) -> list[str] | None:
        if choice is not None and not all(choice or [""]):
            raise ValueError("give at least one text, none of them empty")
        if choice is not None and len(set(choice)) < len(choice):
            raise ValueError("a text is listed twice; remove one")
        return choice

    @field_validator("regex")
    @classmethod
    def _compiles(cls, regex: str | None) -> str | None:
        try:
            re.compile(regex or "")
        except re.error as error:
            raise ValueError(f"{regex!r} is not a regular expression ({error}); fix it") from None
        if regex == "" or "\0" in (regex or ""):
            raise ValueError("give a non-empty regular expression without NUL")
        return regex

    @field_validator("grammar")
    @classmethod
    def _has_a_rule(cls, grammar: str | None) -> str | None:
        if grammar is not None and "::=" not in grammar:
            raise ValueError("there is no rule; write it in EBNF, beginning with `root ::= …`")
        return grammar

    @model_validator(mode="after")
    def _one(self) -> Structured:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of {', '.join(KINDS)}, not {' and '.join(given) or 'none'} "
                "(free text: `structured: null`)"
            )
        return self


def content_of(settings: Structured | None) -> dict[str, Any] | None:
    """The form of completions, as plain JSON with one field; a schema file is replaced by its content.

    Raises:
        SettingsError: the file cannot be read, or does not contain a schema.
    """
    if settings is None:
        return None
    schema = settings.json_schema
    if isinstance(schema, str):
        schema = _read(Path(schema))
    if schema is not None:
        if not schema:
            raise SettingsError(f"{WHERE}.json_schema: the schema is empty; describe the JSON in it")
        return {"json_schema": schema}
    return {kind: value for kind in KINDS if (value := getattr(settings, kind)) is not None}


def _read(path: Path) -> dict[str, Any]:
    where = f"{WHERE}.json_schema: {path}"
    try:
        schema = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise SettingsError(f"{where}: no such file; give a JSON file, or the schema itself") from None
    except OSError as error:
        raise SettingsError(f"{where}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{where}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except ValueError as error:
        raise SettingsError(f"{where}: not JSON ({error}); fix it") from None
    if not isinstance(schema, dict):
        raise SettingsError(f"{where}: contains {schema!r:.40}, but a schema is an object; fix it")
    return schema
