"""The format of a judge's answer: its fields, the instructions for them, and their JSON schema."""

from __future__ import annotations

from typing import Any

from textalign_dagster.judging.template import Template
from textalign_dagster.settings.judge import GROUPWISE

VERDICT_FIELDS = {
    "text": ("feedback", "score"),
    "category": ("label",),
    "judgment": ("judgment",),
    "rating": ("rating",),
    "ranking": ("better",),
    "win": ("better",),
}
"""The fields of an answer that make up the verdict."""

ALIASES = {
    "analysis": ("rationale", "reasoning", "explanation"),
    "feedback": (),
    "score": ("rating", "ratings"),
    "rating": ("ratings", "score"),
    "label": ("category", "feedback"),
    "judgment": ("judgement", "feedback", "critique"),
    "better": ("winner", "preferred", "choice"),
}
"""Other names that judges without a schema use for a field."""

PERFECT = "perfect"
FLAWED = "flawed"
_MOST_LISTED = 21  # scales with more values are given by their bounds


def fields(template: Template) -> tuple[str, ...]:
    """The fields of an answer in the requested order: reasons come before the verdict."""
    return (*(("analysis",) if template.explain else ()), *VERDICT_FIELDS[template.ask])


def answer_format(template: Template, group: bool = False) -> str:
    """The instructions on how to answer; the same for every item."""
    lines = [f'- "{name}": {_meaning(template, name)}' for name in fields(template)]
    if group:
        opening = (
            "You are given one prompt and several numbered responses to it. Judge each response on its own "
            "merits; the order in which they stand means nothing. Answer with one JSON object and nothing "
            'else. Its keys are the numbers of the responses, as text ("1", "2", and so on, all of them), and '
            "each value is an object with these fields, in this order:"
        )
    else:
        opening = "Answer with one JSON object and nothing else, with these fields, in this order:"
    return "\n".join([opening, *lines])


def _meaning(template: Template, name: str) -> str:
    if name == "analysis":
        return "your reasons, in a few sentences"
    if name == "feedback":
        limit = f" of at most {template.max_words} words" if template.max_words else ""
        return f"one sentence{limit}"
    if name == "label":
        return "exactly one of " + ", ".join(f'"{label}"' for label in template.labels)
    if name == "judgment":
        return f'what is wrong with the response, or exactly "{PERFECT}" if nothing is'
    if name == "better":
        return 'exactly "a" or "b"'
    assert template.scale is not None
    number = "a whole number" if template.scale.integer else "a number"
    return f"{number} from {template.scale.low:g} to {template.scale.high:g}"


def response_schema(template: Template, group: int | None = None) -> dict[str, Any]:
    """The JSON schema of an answer, within what strict structured outputs allow.

    Args:
        group: the number of responses judged in one call; None: one item, the plain form.

    Raises:
        ValueError: the template's ask has no groupwise form.
    """
    one = _object({name: _type(template, name) for name in fields(template)})
    if group is None:
        return one
    check_groupwise(template)
    return _object({str(number): one for number in range(1, group + 1)})


def response_format(template: Template, group: int | None = None) -> dict[str, Any]:
    """:func:`response_schema` as the ``response_format`` of a chat completion."""
    name = template.name.replace(".", "_")[:64]  # endpoints allow letters, digits, _ and - here
    schema = {"name": name, "strict": True, "schema": response_schema(template, group)}
    return {"type": "json_schema", "json_schema": schema}


def check_groupwise(template: Template) -> None:
    """Raises:
    ValueError: the template's ask has no groupwise form.
    """
    if template.ask not in GROUPWISE:
        raise ValueError(
            f"template {template.name}: `ask: {template.ask}` judges one item per call; "
            f"groups are for {', '.join(GROUPWISE)}"
        )


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _type(template: Template, name: str) -> dict[str, Any]:
    if name in ("analysis", "feedback", "judgment"):
        return {"type": "string"}
    if name == "label":
        return {"type": "string", "enum": list(template.labels)}
    if name == "better":
        return {"type": "string", "enum": ["a", "b"]}
    scale = template.scale
    assert scale is not None
    if not scale.integer:
        return {"type": "number", "minimum": scale.low, "maximum": scale.high}
    low, high = int(scale.low), int(scale.high)
    if high - low < _MOST_LISTED:
        return {"type": "integer", "enum": list(range(low, high + 1))}
    return {"type": "integer", "minimum": low, "maximum": high}
