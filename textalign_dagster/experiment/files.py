"""Experiments by name: the folders they live in, ``extends``, and variants made by overrides."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from textalign_dagster import PROJECT
from textalign_dagster.experiment import Experiment
from textalign_dagster.ids import content_hash, settings_diff
from textalign_dagster.settings import (
    ONE_VALUE,
    SettingsError,
    describe,
    merge,
    nearest,
    nested,
    parse_override,
    read_yaml,
    validate,
    write_yaml,
)

TEMPLATES = PROJECT / "experiments" / "templates"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+=-]*")

SCORERS = ("scorer", "evaluation.scorer", "evaluation.best_of_n.scorer")
PATHS = (
    *("prompts.path", "offline.path", "evaluation.path"),
    *("evaluation.red_team.path", "evaluation.lm_eval.path", "evaluation.scenarios.*.path"),
    *("sampling.structured.json_schema", "task.data.path"),
    *(f"{scorer}.{field}" for scorer in SCORERS for field in ("path", "check.path")),
)
"""Fields that hold a path."""
NAMES_OR_PATHS = (
    *("policy.model", "evaluation.baselines.*", "evaluation.fluency_model"),
    *("evaluation.kl_reference", "evaluation.red_team.model"),
    *("judge.template", "evaluation.judge.template", "evaluation.best_of_n.judge.template"),
    "training.accelerate",
    *(f"{scorer}.{field}" for scorer in SCORERS for field in ("model", "weights", "names")),
)
"""Fields that hold a path, or a name (of something shipped, installed or on the hub)."""


@dataclass(frozen=True)
class Library:
    """The experiment files of some folders; the first folder that has a name wins.

    Files of one folder may refer to each other, and to those of the other folders, by name
    (``extends``, ``control``). Templates can be read and extended likewise, but are not experiments:
    they are not on the grid, and `textalign new` creates experiments from them.
    """

    folders: tuple[Path, ...]

    @classmethod
    def default(cls, *extra: Path) -> Library:
        """``$TEXTALIGN_EXPERIMENTS`` (folders, separated as in PATH), else the shipped ones; plus variants."""
        configured = os.environ.get("TEXTALIGN_EXPERIMENTS")
        folders = (
            [Path(part) for part in configured.split(os.pathsep) if part]
            if configured
            else [PROJECT / "experiments"]
        )
        return cls((*extra, *folders, variants_folder()))

    @cached_property
    def paths(self) -> dict[str, Path]:
        """Name → file, sorted by name."""
        found: dict[str, Path] = {}
        for folder in self.folders:
            for path in sorted(folder.glob("*.yaml")) if folder.is_dir() else []:
                found.setdefault(path.stem, path)
        return dict(sorted(found.items()))

    @cached_property
    def templates(self) -> dict[str, Path]:
        """Name → file of each template that no experiment of the same name hides, sorted by name."""
        return {path.stem: path for path in sorted(TEMPLATES.glob("*.yaml")) if path.stem not in self.paths}

    def path(self, name: str) -> Path:
        """The file of an experiment or template.

        Raises:
            SettingsError: none has that name.
        """
        both = {**self.templates, **self.paths}
        if name not in both:
            known = ", ".join(self.paths) or "none"
            raise SettingsError(
                f"{name}: no such experiment{nearest(name, both)}; known: {known} "
                f"(in {', '.join(map(str, self.folders))}); templates: {', '.join(self.templates) or 'none'}"
            )
        return both[name]

    def content(self, name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
        """The experiment's fields merged with those of the one it extends, not yet validated."""
        if name in seen:
            raise SettingsError(f"{self.path(name)}: extends itself: {' -> '.join((*seen, name))}")
        path = self.path(name)
        if not NAME.fullmatch(name):
            raise SettingsError(
                f"{path}: rename it: an experiment's name starts with a letter or digit and holds "
                "letters, digits, and _ . + = - only"
            )
        content = read_yaml(path)
        for section in ("task", "method", "scorer"):
            if isinstance(content.get(section), str):
                content[section] = {"name": content[section]}
        content = _absolute_paths(content, path.parent)
        parent = content.pop("extends", None)
        if parent is None:
            return content
        if not isinstance(parent, str):
            raise SettingsError(f"{path}: extends: give the name of one experiment")
        try:
            return merge(self.content(parent, (*seen, name)), content)
        except SettingsError as error:
            if parent not in self.paths and parent not in self.templates:
                raise SettingsError(f"{path}: extends: {error}") from None
            raise

    def load(self, name: str) -> Experiment:
        """The experiment, validated.

        Raises:
            SettingsError: it is invalid; the message names file, field, what is allowed and the nearest name.
        """
        experiment: Experiment = validate(Experiment, self.content(name), str(self.path(name)))
        return experiment

    def load_all(self) -> tuple[dict[str, Experiment], dict[str, str]]:
        """Every experiment that loads, and the error of every one that does not."""
        good: dict[str, Experiment] = {}
        bad: dict[str, str] = {}
        for name in self.paths:
            try:
                good[name] = self.load(name)
            except SettingsError as error:
                bad[name] = str(error)
        return good, bad

    def control_of(self, name: str) -> str | None:
        """The name of an experiment's null control, checked to share everything upstream of training.

        Raises:
            SettingsError: the control is unknown, uses feedback, or differs upstream.
        """
        experiment = self.load(name)
        if experiment.control is None:
            return None
        if name in self.paths and experiment.control in self.templates:
            raise SettingsError(
                f"{self.path(name)}: control: {experiment.control} is a template and cannot be run; write an experiment "
                f"and its control with `textalign new NAME --from TEMPLATE`, or set `control: null`"
            )
        try:
            control = self.load(experiment.control)
        except SettingsError as error:
            raise SettingsError(f"{self.path(name)}: control: {error}") from None
        if control.method.wants is not None:
            raise SettingsError(
                f"{self.path(name)}: control: {experiment.control} uses feedback "
                f"(method {control.method.name}); a null control has method no_feedback"
            )
        differences = settings_diff(experiment.upstream, control.upstream)
        if differences:
            raise SettingsError(
                f"{self.path(name)}: control: {experiment.control} differs upstream of training, so it "
                f"controls nothing: {'; '.join(differences)}; let it extend {name}"
            )
        return experiment.control

    def overridden(self, name: str, overrides: Sequence[str]) -> Experiment:
        """The experiment with ``section.field=value`` overrides, validated; nothing is written."""
        where = f"{self.path(name)} with --set {' --set '.join(overrides)}"
        content = self.content(name)
        changed = merge(content, _changes(overrides, content))
        experiment: Experiment = validate(Experiment, changed, where if overrides else str(self.path(name)))
        return experiment

    def variant(self, name: str, overrides: Sequence[str], folder: Path) -> str:
        """Writes ``name`` with overrides as a separate experiment; its control gets the same overrides.

        Overriding a field never touches what ``name`` has produced: the variant is written to
        ``folder`` as an experiment that extends it, and has its own row in every grid and table.

        Args:
            overrides: ``section.field=value`` each.

        Returns:
            The variant's name, e.g. ``pep8_alt_lmu+seed=1``.

        Raises:
            SettingsError: an override is invalid; nothing is written then.
        """
        if not overrides:
            return name
        experiment, changes = self.overridden(name, overrides), _changes(overrides, self.content(name))
        label = "+".join(sorted(override.replace(" ", "") for override in overrides))
        if not NAME.fullmatch(label) or len(label) > 80:
            label = content_hash(changes)[:8]
        variant = f"{name}+{label}"
        content: dict[str, Any] = {"extends": name, **changes}
        if experiment.control is not None and "control" not in changes:
            shared = {k: v for k, v in changes.items() if k != "method"}
            for section, first in (("scorer", "name"), ("judge", "model")):
                change = shared.get(section)
                lacking = getattr(self.load(experiment.control), section) is None
                if lacking and isinstance(change, dict) and first not in change:
                    del shared[section]  # part of a section that the control does not have
            if "datapool" in shared:  # the buckets in `shares` are those of the method
                shared["datapool"] = {**shared["datapool"], "shares": None}
            control = f"{experiment.control}+{label}"
            content["control"] = control
            _write(folder / f"{control}.yaml", {"extends": experiment.control, **shared})
        _write(folder / f"{variant}.yaml", content)
        return variant

    def adopt(self, name: str, template: str) -> list[Path]:
        """Writes an experiment of the user's own from a template (or another experiment), commented.

        Its null control is written next to it, as an experiment that extends it.

        Returns:
            The files written, in the first of the folders.

        Raises:
            SettingsError: the name is invalid or taken; nothing is written then.
        """
        if not NAME.fullmatch(name):
            raise SettingsError(
                f"{name!r}: a name starts with a letter or digit and holds letters, digits, and _ . + = - only"
            )
        experiment, content = self.load(template), self.content(template)
        folder, control = self.folders[0], f"{name}_no_feedback"
        files = {folder / f"{name}.yaml": ""}
        if experiment.control is not None:
            content["control"] = control
            files[folder / f"{control}.yaml"] = ""
        for path in files:
            if path.stem in self.paths or path.exists():
                raise SettingsError(
                    f"{path.stem}: an experiment of that name already exists; choose another name"
                )
        described = describe(Experiment.model_validate(content), only=content)
        files[folder / f"{name}.yaml"] = (
            f"# Written from {template}. `textalign show-config {name}` shows every setting with its default.\n"
            f"{described}\n"
        )
        if experiment.control is not None:
            plain = self.load(experiment.control).model_dump(mode="json")
            changes = _differences(experiment.model_dump(mode="json"), plain) | {"control": None}
            files[folder / f"{control}.yaml"] = (
                f"# The null control of {name}: the same without feedback.\n"
                f"{write_yaml({'extends': name, **changes})}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in files.items():
            path.write_text(text, encoding="utf-8")
        return list(files)


def _differences(base: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of ``other`` that differ from ``base``; a section with another name as a whole."""
    found: dict[str, Any] = {}
    for field, value in other.items():
        before = base.get(field)
        if value == before:
            continue
        found[field] = value
        sections = isinstance(value, dict) and isinstance(before, dict) and field not in ONE_VALUE
        if sections and value.get("name") == before.get("name"):  # type: ignore[union-attr]
            found[field] = _differences(before, value)  # type: ignore[arg-type]
    return found


def _changes(overrides: Sequence[str], content: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of an experiment that overrides change."""
    changes: dict[str, Any] = {}
    for override in overrides:
        path, value = parse_override(override)
        if len(path) > 1 and path[-2] in ONE_VALUE:  # one entry of it: the others are kept
            whole: Any = merge(content, changes)
            for step in path[:-1]:
                whole = whole.get(step) if isinstance(whole, dict) else None
            path, value = path[:-1], {**(whole or {}), path[-1]: value}
        changes = merge(changes, nested(path, value))
    return _absolute_paths(changes, Path.cwd())  # relative to where the command was run


def _absolute_paths(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """An experiment file's fields, with paths resolved relative to that file's folder, wherever it is extended from."""
    for field in PATHS:
        content = _absolute(content, field.split("."), folder)
    for field in NAMES_OR_PATHS:
        content = _absolute(content, field.split("."), folder, only_existing=True)
    task = content.get("task")
    if isinstance(task, dict) and task.get("chat_template") != "model":
        content = _absolute(content, ("task", "chat_template"), folder)
    return content


def _absolute(value: Any, field: Sequence[str], folder: Path, only_existing: bool = False) -> Any:
    """The value with the path that one of its fields holds resolved; ``*`` stands for any field."""
    if field and isinstance(value, dict):
        name, *inner = field
        return {
            key: _absolute(item, inner, folder, only_existing) if name in (key, "*") else item
            for key, item in value.items()
        }
    if field or not isinstance(value, str):
        return value
    target = folder / value
    if only_existing and not target.exists() and not value.startswith((".", "/")):
        return value
    return str(target.resolve())


def variants_folder() -> Path:
    """Where variants are kept: next to the artifacts, so that the code location shows them too."""
    return home() / "variants"


def home() -> Path:
    """``$TEXTALIGN_HOME``, else ``state/`` in the project: artifacts, variants, Dagster's history."""
    return Path(os.environ.get("TEXTALIGN_HOME") or PROJECT / "state").resolve()


def store_url() -> str:
    """``$TEXTALIGN_STORE`` (a folder or ``s3://…``), else ``store/`` in :func:`home`."""
    return os.environ.get("TEXTALIGN_STORE") or str(home() / "store")


def _write(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = f"# Written by `textalign run --set`; edit or delete it freely.\n{write_yaml(content)}"
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
