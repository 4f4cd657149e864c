"""Finding the fields of an answer in a reply: JSON first, then labelled lines, then a bare verdict."""

from __future__ import annotations

import re
from typing import Any

from textalign_dagster.judging import readings
from textalign_dagster.judging.answers import ALIASES, VERDICT_FIELDS, fields
from textalign_dagster.judging.extract import Found, Unreadable, begins_with_object, find_json, labelled
from textalign_dagster.judging.labels import match_choice, match_label, named_choices, named_labels
from textalign_dagster.judging.template import Template
from textalign_dagster.judging.verdict import Reply
from textalign_dagster.settings.judge import PAIRWISE

_JUDGMENT_LABEL = re.compile(r"^\W*(?:judge?ment|critique|feedback)\W{0,3}:\s*", re.IGNORECASE)


def fields_of(template: Template, text: str, reply: Reply) -> dict[str, Any]:
    """The fields of an answer under their canonical names, values not yet checked."""
    found = find_json(text)
    answers = [answer for answer in (known_fields(template, o) for o in found.objects) if answer]
    decisive = VERDICT_FIELDS[template.ask]
    complete = [answer for answer in answers if set(decisive) <= set(answer)]
    if complete:
        first = complete[0]
        if template.ask == "judgment" and not found.alone:
            raise Unreadable("an answer in JSON with other text around it")
        others = [{k: a[k] for k in decisive} for a in complete[1:]]
        if any(other != {k: first[k] for k in decisive} for other in others):
            raise Unreadable("two different answers")
        _agrees(template, first, found)
        return first
    if reply.finish_reason == "length":
        raise Unreadable("cut off: the reply ends at its token limit")
    if answers:
        missing = [name for name in decisive if name not in answers[0]]
        raise Unreadable(f"no field `{'`, `'.join(missing)}`")
    if template.ask == "judgment":  # any text is a critique, even one that quotes JSON
        if begins_with_object(text):
            raise Unreadable("broken JSON" if found.broken else "no field `judgment`")
    elif found.broken:
        raise Unreadable("broken JSON")
    return _plain(template, text)


def _agrees(template: Template, answer: dict[str, Any], found: Found) -> None:
    """Raises Unreadable if text around the JSON gives another verdict (the JSON may be a quotation)."""
    deciding = VERDICT_FIELDS[template.ask][-1]
    if deciding == "judgment" or not found.rest:
        return
    for content in _parts(template, found.rest).get(deciding, []):
        other = verdict_of(template, deciding, content)
        if other is not None and other != verdict_of(template, deciding, answer[deciding]):
            raise Unreadable("two different answers: one in JSON, one outside it")


def known_fields(template: Template, answer: Any, unwrap: bool = True) -> dict[str, Any]:
    """The template's fields in an object, under their own names or common aliases."""
    if not isinstance(answer, dict):
        return {}
    given = {str(name).strip().lower(): value for name, value in answer.items()}
    known = {}
    for name in fields(template):
        values = [given[n] for n in (name, *_aliases(template, name)) if n in given]
        if name in given:
            known[name] = given[name]
        elif values:
            if any(value != values[0] for value in values):
                raise Unreadable(f"`{name}` is given under two names, differently")
            known[name] = values[0]
    if unwrap and not known and len(given) == 1:
        return known_fields(template, next(iter(given.values())), unwrap=False)  # {"answer": {…}}
    return known


def _aliases(template: Template, name: str) -> tuple[str, ...]:
    return tuple(alias for alias in ALIASES[name] if alias not in fields(template))


def _parts(template: Template, text: str) -> dict[str, list[str]]:
    names = {alias: name for name in fields(template) for alias in _aliases(template, name)}
    names |= {name: name for name in (*fields(template), "analysis")}
    if template.ask in PAIRWISE:
        names |= {"preferred output": "better", "better output": "better", "better response": "better"}
    parts: dict[str, list[str]] = {}
    for given, contents in labelled(text, names).items():
        parts.setdefault(names[given], []).extend(contents)
    return parts


def _plain(template: Template, text: str) -> dict[str, Any]:
    """The fields of an answer that is not JSON."""
    if template.ask == "judgment":
        if not template.explain:
            return {"judgment": _JUDGMENT_LABEL.sub("", text)}
        parts = _parts(template, text)
        if len(parts.get("judgment", [])) != 1:
            raise Unreadable("no single labelled judgment")
        return {name: contents[0] for name, contents in parts.items()}
    parts = _parts(template, text)
    decisive = VERDICT_FIELDS[template.ask]
    if any(name in parts for name in decisive):
        missing = [name for name in decisive if name not in parts]
        if missing:
            raise Unreadable(f"no field `{'`, `'.join(missing)}`")
        for name in decisive:
            if len({verdict_of(template, name, content) for content in parts[name]}) > 1:
                raise Unreadable(f"two different answers for `{name}`")
        answer: dict[str, Any] = {name: parts[name][0] for name in decisive}
        return answer | ({"analysis": parts["analysis"][0]} if "analysis" in parts else {})
    if template.ask == "text":
        raise Unreadable("no labelled feedback and score")
    return _unlabelled(template, text)


def _unlabelled(template: Template, text: str) -> dict[str, Any]:
    """The verdict of a reply that consists of it, or has it alone on its first or last line."""
    lines = [line for line in text.split("\n") if line.strip()]
    name = VERDICT_FIELDS[template.ask][0]
    found = {verdict_of(template, name, part, alone=True) for part in (text, lines[0], lines[-1])} - {None}
    if template.ask == "category":
        found |= named_labels(text, template.labels) if found else set()
    elif template.ask in PAIRWISE:
        found |= named_choices(text) if found else set()
    if len(found) != 1:
        raise Unreadable("two different answers" if found else "no answer in the requested form")
    return {name: found.pop()}


def verdict_of(template: Template, name: str, content: Any, alone: bool = False) -> Any:
    """The value of a verdict field; None: there is none.

    Raises:
        Unreadable: there is one, but it is not allowed.
    """
    if name in ("score", "rating"):
        assert template.scale is not None
        if not isinstance(content, str):
            return readings.number(content, template.scale)
        return readings.number_in_words(content, template.scale, alone)
    if not isinstance(content, str):
        return None
    if name == "label":
        return match_label(content, template.labels)
    return match_choice(content) if name == "better" else " ".join(content.split())
