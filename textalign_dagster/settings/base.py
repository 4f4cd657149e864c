"""Strict settings: the pydantic base, overrides, and actionable errors."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import pydantic
from pydantic import BaseModel, ConfigDict

from textalign_dagster.settings.yaml_text import SettingsError, parse_yaml, write_yaml

SECRET_NAME = re.compile(
    r"(^|[-_])(api[-_]?key|secret([-_]?key)?|access[-_]?key|private[-_]?key|password|passwd|credentials?"
    r"|authorization|(auth|access|api)[-_]?token|bearer)$",
    re.IGNORECASE,
)
"""Names of fields that hold secrets: settings are written to disk, so they must not contain any."""


class Settings(BaseModel):
    """A frozen section of settings: unknown fields and wrong types are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def parse_override(text: str) -> tuple[list[str], Any]:
    """``section.field=value`` as (path, value); the value is parsed as YAML: numbers, lists, booleans."""
    name, equals, value = text.partition("=")
    path = [part.strip() for part in name.split(".")]
    if not equals or not all(path):
        raise SettingsError(f"--set {text}: write it as section.field=value")
    try:
        return path, parse_yaml(value, "")
    except SettingsError as error:
        problem = str(error).partition("broken YAML: ")[2]
        quoted = json.dumps(value, ensure_ascii=False)
        raise SettingsError(
            f"--set {text}: the value is broken YAML ({problem}); if it is text, quote it: "
            f"--set '{name}={quoted}'"
        ) from None


ONE_VALUE = frozenset({"shares", "structured"})
"""Fields whose mapping is a single value: an override replaces it as a whole."""


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` overridden by ``changes``, section by section.

    Lists and single-value mappings are replaced. A section whose ``name`` changes (another method or
    task) starts from scratch, because the old options would be meaningless for the new one.
    """
    merged = dict(base)
    for key, value in changes.items():
        before = merged.get(key)
        if key not in ONE_VALUE and isinstance(before, Mapping) and isinstance(value, Mapping):
            renamed = "name" in value and value["name"] != before.get("name")
            merged[key] = dict(value) if renamed else merge(before, value)
        else:
            merged[key] = value
    return merged


def nested(path: list[str], value: Any) -> dict[str, Any]:
    """``{"a": {"b": value}}`` for the path ``a.b``."""
    changes: dict[str, Any] = {path[-1]: value}
    for key in reversed(path[:-1]):
        changes = {key: changes}
    return changes


def validate(model: type[BaseModel], content: Mapping[str, Any], where: str) -> Any:
    """The content, validated as ``model``.

    Raises:
        SettingsError: one line per problem, with place, field, what is allowed and the nearest known name.
    """
    try:
        return model.model_validate(content)
    except pydantic.ValidationError as error:
        lines = [_explain(model, content, problem, where) for problem in error.errors()]
        raise SettingsError("\n".join(dict.fromkeys(lines))) from None


def nearest(name: str, known: Iterable[str], cutoff: float = 0.5) -> str:
    """`` (did you mean 'x'?)`` if a known name is close, else an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _explain(model: type[BaseModel], content: Any, problem: Any, where: str) -> str:
    # A discriminated union puts its tag into the location ("method", "alt_lmu", "template").
    place, tag_model = model, None
    path: list[Any] = []
    value: Any = content
    for step in problem["loc"]:
        if isinstance(value, Mapping) and step not in value and value.get("name") == step:
            tag_model = _member(place, path[-1], step) if path else None
            continue
        path.append(step)
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
    field = ".".join(str(step) for step in path)
    owner = tag_model or _section(model, path[:-1])
    kind = problem["type"]
    if kind == "extra_forbidden":
        known = list(owner.model_fields) if owner else []
        hint = nearest(str(path[-1]), known, cutoff=0.8) or _elsewhere(model, field)
        hint = hint or nearest(str(path[-1]), known)
        return f"{where}: {field}: unknown field{hint}; known here: {', '.join(known)}"
    if kind == "missing":
        return f"{where}: {field}: missing; add it"
    if kind == "union_tag_not_found":
        members = _models(owner.model_fields[str(path[-1])].annotation) if owner else []
        names = [str(name) for m in members for name in get_args(m.model_fields["name"].annotation)]
        return f"{where}: {field}.name: missing; one of: {', '.join(names)}"
    if kind == "union_tag_invalid":
        allowed = str(problem.get("ctx", {}).get("expected_tags", "")).replace("'", "")
        given = str(problem.get("ctx", {}).get("tag", ""))
        hint = nearest(given, allowed.split(", "))
        return f"{where}: {field}: unknown name {given!r}{hint}; one of: {allowed}"
    if kind == "literal_error":
        allowed = str(problem["ctx"]["expected"]).replace("'", "")
        hint = nearest(str(problem["input"]), re.split(r", | or ", allowed))
        return f"{where}: {field}: {problem['input']!r} is not allowed{hint}; one of: {allowed}"
    message = problem["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    message = PLAIN_WORDS.get(kind, message)
    if kind == "value_error":
        return f"{where}: {field}: {message}" if field else f"{where}: {message}"
    return f"{where}: {field}: {problem['input']!r} given, but it should be {message}"


PLAIN_WORDS = {
    "model_type": "a section of fields",
    "model_attributes_type": "a section of fields",
    "dict_type": "a section of fields",
    "tuple_type": "a list, as in [1, 2]",
    "string_type": "text (in quotes, if it looks like something else)",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
}
"""Wording for pydantic's error types that mention Python types."""


def _elsewhere(model: type[BaseModel], field: str) -> str:
    """The hint for a field that exists in another section: its full name."""
    full = {known.rpartition(".")[2]: known for known in reversed(_fields(model)) if known != field}
    close = difflib.get_close_matches(field.rpartition(".")[2], list(full), n=1, cutoff=0.8)
    return f" (did you mean {full[close[0]]!r}?)" if close else ""


def _fields(model: type[BaseModel], prefix: str = "") -> list[str]:
    found: list[str] = []
    for name, field in model.model_fields.items():
        found.append(f"{prefix}{name}")
        for section in _models(field.annotation):
            found += _fields(section, f"{prefix}{name}.")
    return found


def _section(model: type[BaseModel], path: list[Any]) -> type[BaseModel] | None:
    for step in path:
        field = model.model_fields.get(str(step))
        found = _models(field.annotation) if field else []
        if len(found) != 1:
            return None
        model = found[0]
    return model


def _member(model: type[BaseModel], field: Any, tag: Any) -> type[BaseModel] | None:
    annotation = model.model_fields[str(field)].annotation if field in model.model_fields else None
    for member in _models(annotation):
        name = member.model_fields.get("name")
        if name is not None and tag in get_args(name.annotation):
            return member
    return None


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models(argument)]


def describe(settings: BaseModel, indent: int = 0, only: Mapping[str, Any] | None = None) -> str:
    """The settings as YAML, each field under its description: what ``textalign show-config`` prints.

    Args:
        only: the fields to show, nested; None: all.
    """
    lines: list[str] = []
    pad = " " * indent
    for name, field in type(settings).model_fields.items():
        if only is not None and name not in only:
            continue
        value = getattr(settings, name)
        within = only.get(name) if only is not None else None
        if field.description:
            lines.append(f"{pad}# {field.description}")
        if isinstance(value, BaseModel):
            lines.append(f"{pad}{name}:")
            lines.append(describe(value, indent + 2, within if isinstance(within, Mapping) else None))
        else:
            plain = settings.model_dump(mode="json")[name]
            lines.append(f"{pad}{name}: {_scalar(plain)}")
        if not indent:
            lines.append("")
    return "\n".join(lines).rstrip()


def _scalar(value: Any) -> str:
    """A value as a single line of YAML."""
    text = write_yaml(value, default_flow_style=True, width=float("inf"))
    return text.strip().removesuffix("...").strip()
