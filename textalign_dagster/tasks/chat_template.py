"""Dialogues rendered by a chat template, as models contain one."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from textalign_dagster.settings import SettingsError
from textalign_dagster.tasks.written import ChatTemplate, Writer
from textalign_dagster.turns import BadDialogue, Dialogue, alternating


class _Generation(Extension):
    """``{% generation %}`` marks what a model wrote, for training; it prints what it encloses."""

    tags = {"generation"}  # noqa: RUF012 (as the base class has it)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)  # Jinja's own escapes HTML


@lru_cache(maxsize=8)
def templated(template: ChatTemplate) -> Writer:
    """A writer that renders a chat template (Jinja), ending with the template's cue for an answer.

    A template is untrusted code: it runs in Jinja's sandbox, as in transformers. It gets no
    beginning-of-sequence token (the tokenizer adds its own in front, also before a condition) and no
    date (a prompt must not change overnight).

    Raises:
        SettingsError: it is not a template, or needs an end token that is unknown.
    """
    # Set up as in transformers, so that models' templates render as intended.
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    try:
        variables = meta.find_undeclared_variables(environment.parse(template.source))
        program = environment.from_string(template.source)
    except TemplateSyntaxError as error:
        raise SettingsError(
            f"task.chat_template: {template.where} is not a chat template (line {error.lineno}: {error.message})"
        ) from None
    if template.end is None and "eos_token" in variables:
        raise SettingsError(
            f"task.chat_template: {template.where} uses `eos_token`, which is unknown for a file; write the token "
            "itself there, or set `chat_template: model`"
        )

    def write(turns: Dialogue) -> str:
        # Most templates reject two consecutive turns of one side.
        messages = [{"role": turn.role, "content": turn.content} for turn in alternating(turns)]
        try:
            return program.render(
                messages=messages, add_generation_prompt=True, bos_token="", eos_token=template.end
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise BadDialogue(f"the chat template rejects it: {error}") from None

    return write


def template_file(path: Path) -> ChatTemplate:
    """The template in a file.

    Raises:
        SettingsError: it cannot be read.
    """
    try:
        return ChatTemplate(path.read_text(encoding="utf-8"), str(path))
    except UnicodeDecodeError as error:
        raise SettingsError(f"task.chat_template: {path}: not UTF-8 (byte {error.start})") from None
    except OSError as error:
        raise SettingsError(f"task.chat_template: {path}: cannot be read: {error.strerror}") from None


def template_of_model(folder: Path) -> ChatTemplate:
    """The chat template of a model: ``chat_template.jinja``, or in ``tokenizer_config.json``.

    Raises:
        SettingsError: it has none.
    """
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = {}
    config = config if isinstance(config, dict) else {}
    end = config.get("eos_token")
    end = end.get("content") if isinstance(end, dict) else end
    own_file = folder / "chat_template.jinja"
    if own_file.is_file():
        return replace(template_file(own_file), end=end)
    found = config.get("chat_template")
    if isinstance(found, list):  # some models have several, by name
        found = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}.get("default")
    if not isinstance(found, str):
        raise SettingsError(
            f"task.chat_template: {folder} has no chat template; give a file with one, or `format: hh`"
        )
    return ChatTemplate(found, str(folder), end)
