"""The shipped templates by name, and users' own by path; checked including their examples."""

from __future__ import annotations

import json
from pathlib import Path

import pydantic

from textalign_dagster.judging.parsing import parse
from textalign_dagster.judging.template import Template
from textalign_dagster.judging.verdict import Reply
from textalign_dagster.settings import SettingsError, nearest, read_yaml, validate
from textalign_dagster.settings.judge import Judge

FOLDER = Path(__file__).parent / "templates"


def shipped() -> dict[str, Path]:
    """The templates that come with the project: name → file."""
    return {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}


def load_template(name_or_path: str | Path) -> Template:
    """A shipped template by name, or one of the user's by path (it ends in .yaml or has a slash).

    Raises:
        SettingsError: naming file, field and remedy.
    """
    known, given = shipped(), str(name_or_path)
    if given in known:
        return read_template(known[given])
    if not given.endswith((".yaml", ".yml")) and "/" not in given:
        raise SettingsError(
            f"judge template {given!r}: no such template{nearest(given, known)}; shipped: {', '.join(known)} "
            "(or give the path of your own .yaml file)"
        )
    return read_template(Path(given))


def template_of(judge: Judge) -> Template:
    """A judge's template, on its scale.

    Raises:
        SettingsError: naming file or field, and remedy.
    """
    template = load_template(judge.template)
    if template.ask != judge.ask:
        raise SettingsError(
            f"judge.ask: {judge.ask!r}, but the template {judge.template} asks for {template.ask!r}; "
            "make them agree"
        )
    if judge.scale is None:
        return template
    try:
        return template.with_scale(judge.scale.low, judge.scale.high)
    except pydantic.ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise SettingsError(f"judge.scale: not valid for the template {judge.template}: {reason}") from None


def read_template(path: Path) -> Template:
    """Reads the template in a file.

    Raises:
        SettingsError: naming file, field and remedy.
    """
    template: Template = validate(Template, read_yaml(path), str(path))
    for problem in example_problems(template):
        raise SettingsError(f"{path}: {problem}")
    return template


def example_problems(template: Template) -> list[str]:
    """Problems with examples whose answers the template itself would reject: a judge learns from them."""
    problems = []
    for number, example in enumerate(template.examples, start=1):
        try:
            answer = json.dumps(example.answer)
        except (TypeError, ValueError):
            problems.append(f"examples: example {number}: answer: write text, numbers, true or false only")
            continue
        verdict = parse(template, Reply(answer))
        if verdict.status != "ok":
            problems.append(f"examples: example {number}: answer: {verdict.reason}; correct it")
        elif template.explain and verdict.analysis is None:
            problems.append(
                f"examples: example {number}: answer: no `analysis`; add it, or set `explain: false`"
            )
    return problems
