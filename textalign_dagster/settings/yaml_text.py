"""YAML for experiment files: YAML 1.2's scalars, no duplicate fields, errors with line and column."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import yaml


class SettingsError(Exception):
    """Bad input in an experiment file, an override or a prompt file; the message says what to change."""


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 scalars (``1e-4`` is a number, ``no`` is a string), unique keys."""


# PyYAML implements YAML 1.1, where 1e-4 is a string, "no" is False and 1:30 is 90.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regexp) for tag, regexp in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9]+$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)


def _unique_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        if key_node.tag.endswith(":merge"):
            continue
        if not isinstance(key_node, yaml.ScalarNode):
            problem = "a field's name is a word, not a list or a mapping (quote text with braces)"
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(
                None, None, f"the field {key!r} is given twice", key_node.start_mark
            )
        seen.add(key)
    return dict(loader.construct_mapping(node, deep=True))


def _decimal(loader: _Loader, node: yaml.ScalarNode) -> int:
    return int(node.value)  # PyYAML's own reads 0777 as octal


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _unique_mapping)
_Loader.add_constructor("tag:yaml.org,2002:int", _decimal)


class _FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """The same with libyaml's parser, if PyYAML has it: several times faster, with poorer errors."""

    yaml_implicit_resolvers = _Loader.yaml_implicit_resolvers
    yaml_constructors = _Loader.yaml_constructors


class _Dumper(yaml.SafeDumper):
    """SafeDumper that quotes every string that YAML 1.1 or :class:`_Loader` would not read as a string."""


_Dumper.yaml_implicit_resolvers = {
    first: [
        *yaml.SafeDumper.yaml_implicit_resolvers.get(first, []),
        *_Loader.yaml_implicit_resolvers.get(first, []),
    ]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def _text(dumper: _Dumper, value: str) -> yaml.ScalarNode:
    # PyYAML loses rare line breaks (U+0085) in any but double quotes; there, all are escaped.
    style = None if value.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style=style)


_Dumper.add_representer(str, _text)


def write_yaml(value: Any, **style: Any) -> str:
    """The value as YAML that :func:`parse_yaml` reads back unchanged."""
    text = yaml.dump(value, Dumper=_Dumper, allow_unicode=True, sort_keys=False, **style)
    return cast(str, text)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        SettingsError: the file is unreadable, not UTF-8, broken YAML (with line and column) or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SettingsError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"{path}: not UTF-8 (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise SettingsError(f"{path}: cannot be read: {error.strerror}") from None
    content = parse_yaml(text, str(path))
    if not isinstance(content, dict):
        raise SettingsError(f"{path}: expected fields such as `method: alt_lmu`, found {content!r}")
    return content


def parse_yaml(text: str, where: str) -> Any:
    """One YAML value; ``where`` names its origin in errors."""
    try:
        return yaml.load(text, Loader=_FastLoader)
    except yaml.YAMLError:
        pass  # the other parser reports where and why
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        place = f"{where}:{mark.line + 1}:{mark.column + 1}" if mark else where
        raise SettingsError(f"{place}: broken YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise SettingsError(f"{where}: broken YAML: {error}") from None
