"""The sections of an experiment, typed; strict settings and actionable errors.

Other packages import the base from here, and each section from its own module.
"""

from textalign_dagster.settings.base import (
    ONE_VALUE,
    SECRET_NAME,
    Settings,
    describe,
    merge,
    nearest,
    nested,
    parse_override,
    validate,
)
from textalign_dagster.settings.yaml_text import SettingsError, parse_yaml, read_yaml, write_yaml

__all__ = [
    "ONE_VALUE",
    "SECRET_NAME",
    "Settings",
    "SettingsError",
    "describe",
    "merge",
    "nearest",
    "nested",
    "parse_override",
    "parse_yaml",
    "read_yaml",
    "validate",
    "write_yaml",
]
