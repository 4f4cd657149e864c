"""Parses a raw reply into a verdict: a pure function, so a newer parser can re-read replies already paid for.

Whatever is not clearly an answer is ``unparseable`` or ``failed``: never a number, never a label. A reply
with two different answers has none.
"""

from __future__ import annotations

from typing import Any

from textalign_dagster.judging import readings
from textalign_dagster.judging.answers import FLAWED, PERFECT, VERDICT_FIELDS, check_groupwise
from textalign_dagster.judging.critique import read_judgment
from textalign_dagster.judging.extract import Unreadable, find_json, strip_reasoning
from textalign_dagster.judging.finding import fields_of, known_fields, verdict_of
from textalign_dagster.judging.template import Template
from textalign_dagster.judging.verdict import Reply, Verdict, failed, unparseable
from textalign_dagster.settings.judge import PAIRWISE

PARSER_VERSION = "1"
"""Incremented whenever any reply is read differently; stored with every row."""


def parse(template: Template, reply: Reply) -> Verdict:
    """The verdict of a reply to a plain call (`rendering.single_call`, `rendering.pair_calls`)."""
    text = _answer(reply)
    if isinstance(text, Verdict):
        return text
    try:
        return _from_fields(template, fields_of(template, text, reply))
    except Unreadable as problem:
        return _unusable(str(problem), text)


def parse_group(template: Template, reply: Reply, count: int) -> list[Verdict]:
    """The verdicts of a reply to a groupwise call, in the order in which the responses were shown.

    A bad entry invalidates only itself; an answer for a response that was not shown, or two answers
    for one, invalidate all (the judge has lost count).
    """
    check_groupwise(template)
    text = _answer(reply)
    if isinstance(text, Verdict):
        return [text] * count
    try:
        entries = _entries(template, text, reply, count)
    except Unreadable as problem:
        return [_unusable(str(problem), text)] * count
    verdicts = []
    for number in map(str, range(1, count + 1)):
        try:
            if number not in entries:
                raise Unreadable(f"no answer for response {number} of {count}")
            entry = entries[number]
            if not isinstance(entry, dict) and len(VERDICT_FIELDS[template.ask]) == 1:
                entry = {VERDICT_FIELDS[template.ask][0]: entry}  # {"1": 6}
            verdicts.append(_from_fields(template, known_fields(template, entry)))
        except Unreadable as problem:
            verdicts.append(unparseable(str(problem)))
    return verdicts


def _answer(reply: Reply) -> str | Verdict:
    """The answer in a reply, or the verdict where there is none."""
    if reply.error is not None:
        return failed(reply.error or "the call failed")
    if reply.refusal:
        return failed(f"refused: {readings.excerpt(reply.refusal)}")
    if reply.finish_reason == "content_filter":
        return failed("refused: stopped by the endpoint's content filter")
    text = strip_reasoning(readings.mended(reply.text or ""))
    if not text:
        if reply.finish_reason == "length" or text is None:
            return unparseable("cut off before an answer")
        return unparseable("empty reply")
    return text


def _unusable(reason: str, text: str) -> Verdict:
    if readings.is_refusal(text):
        return failed(f"refused: {readings.excerpt(text)}")
    return unparseable(reason)


def _from_fields(template: Template, answer: dict[str, Any]) -> Verdict:
    analysis = answer.get("analysis")
    analysis = readings.mended(analysis).strip() or None if isinstance(analysis, str) else None
    missing = [name for name in VERDICT_FIELDS[template.ask] if name not in answer]
    if missing:
        raise Unreadable(f"no field `{'`, `'.join(missing)}`")
    if template.ask == "judgment":
        critique = read_judgment(answer["judgment"])
        label = PERFECT if critique is None else FLAWED
        return Verdict("ok", label=label, text=critique, analysis=analysis)
    name = VERDICT_FIELDS[template.ask][-1]
    verdict = verdict_of(template, name, answer[name])
    if verdict is None:
        raise Unreadable(f"`{name}` is not allowed: {readings.excerpt(repr(answer[name]))}")
    if template.ask == "category" or template.ask in PAIRWISE:
        return Verdict("ok", label=verdict, analysis=analysis)
    feedback = readings.words(answer["feedback"], "feedback") if template.ask == "text" else None
    if feedback and template.max_words and len(feedback.split()) > 2 * template.max_words:
        # Judges overrun a little; more than twice is not the requested sentence.
        raise Unreadable(
            f"the feedback has {len(feedback.split())} words, more than twice the {template.max_words} allowed"
        )
    return Verdict("ok", value=verdict, text=feedback, analysis=analysis)


def _entries(template: Template, text: str, reply: Reply, count: int) -> dict[str, Any]:
    """The entries of a groupwise answer, keyed by number (as text)."""
    found = find_json(text)
    candidates = [numbered for o in found.objects if (numbered := _numbered(o))]
    if not candidates and reply.finish_reason == "length":
        raise Unreadable("cut off: the reply ends at its token limit")
    if not candidates:
        raise Unreadable(
            "broken JSON" if found.broken else "no JSON object keyed by the numbers of the responses"
        )
    if any(candidate != candidates[0] for candidate in candidates[1:]):
        raise Unreadable("two different answers")
    unknown = set(candidates[0]) - {str(number) for number in range(1, count + 1)}
    if unknown:
        raise Unreadable(f"an answer for response {min(unknown)}, but {count} were shown")
    return candidates[0]


def _numbered(answer: Any, unwrap: bool = True) -> dict[str, Any]:
    if not isinstance(answer, dict) or not answer:
        return {}
    if all(str(key).strip().isdecimal() for key in answer):
        entries = {str(int(key)): value for key, value in answer.items()}
        if len(entries) < len(answer):
            raise Unreadable("two answers for one response")
        return entries
    # {"answers": {"1": …}}
    return _numbered(next(iter(answer.values())), unwrap=False) if unwrap and len(answer) == 1 else {}
