"""Judging with language models: building questions, parsing replies, combining verdicts.

Everything here is pure: no network, no clock. Calls go out through the judge client; responses
come in as :class:`Reply`.
"""

from __future__ import annotations

from textalign_dagster.judging.answers import response_format, response_schema
from textalign_dagster.judging.asking import Answer, Judged, Question
from textalign_dagster.judging.asks import asking
from textalign_dagster.judging.catalogue import load_template, shipped, template_of
from textalign_dagster.judging.pairs import PAIRS
from textalign_dagster.judging.parsing import PARSER_VERSION, parse, parse_group
from textalign_dagster.judging.rendering import Item, group_call, pair_calls, single_call, without_system
from textalign_dagster.judging.template import Template
from textalign_dagster.judging.verdict import Reply, Verdict

__all__ = [
    "PAIRS",
    "PARSER_VERSION",
    "Answer",
    "Item",
    "Judged",
    "Question",
    "Reply",
    "Template",
    "Verdict",
    "asking",
    "group_call",
    "load_template",
    "pair_calls",
    "parse",
    "parse_group",
    "response_format",
    "response_schema",
    "shipped",
    "single_call",
    "template_of",
    "without_system",
]
