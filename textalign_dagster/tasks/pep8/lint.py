"""pycodestyle as a critic of sampled code: violations, a feedback sentence, a reward, a score.

A sample is a prompt (a function's header) and its continuation, usually cut off after a fixed
number of tokens. What is judged is the *body*: the continuation up to its last whole line. Hits
in the prompt are not the policy's doing and do not count; what the policy puts on the header's
line does.

Style and syntax are kept apart. `violations` holds style alone; a body that does not parse has
`parses == False` and the issue E999. A body of nothing but blanks, comments, strings, `pass` and
`...` is `empty`: no linter objects to it, so it must not win (see `reward` and `score`).
"""

from __future__ import annotations

import ast
import functools
import io
import itertools
import re
import warnings
from collections import Counter
from dataclasses import dataclass

import pycodestyle

# pycodestyle's default list, spelled out because an explicit list replaces it. Added: what only
# depends on where the sample was cut (W391, W292) or on Python's tokenizer (W605). Removed: E704, a
# body on the header's line, which would otherwise be a way around the linter.
IGNORED_CODES = ("E121", "E123", "E126", "E226", "E24", "W503", "W504", "W391", "W292", "W605")
NO_ISSUES = "no issues"
NO_CODE = "no code"
SYNTAX_ERROR = "E999 syntax error"
CATEGORIES = ("clean", "minor issues", "some issues", "sloppy")  # best first: scores 3, 2, 1, 0
NAMED_CODES = 3  # a feedback sentence names this many codes, then "and more"

EMPTY_REWARD = -4.0
MIN_REWARD_LINES = 3
TRAILING_LINES = 3  # a cut sample can end within a statement; this many lines can be dropped before parsing

_NOQA = re.compile(r"(# no)(qa|pep8)\b", re.IGNORECASE)
_MESSAGE_DETAIL = re.compile(r"( \(.*\)|, found .*)$")
_PYTHON_TOKEN = re.compile(r"\w+|[^\w\s]")
_SPAN = re.compile(r"\w+|[^\S\n]+|[^\w\s]+|\n")  # what a violation marks: a word, blanks, or punctuation
_NOTHING = re.compile(r"\s*(#.*|pass\s*;?|\.\.\.\s*;?)?\s*")


@dataclass(frozen=True)
class Violation:
    """One hit of the linter: `line` counts from 1 in the body, 0 is the prompt's last line."""

    code: str  # "E225"
    message: str  # "missing whitespace around operator"
    line: int
    column: int  # from 0


@dataclass(frozen=True)
class Lint:
    """The findings for one body."""

    body: str  # whole lines only
    violations: tuple[Violation, ...]  # style; in the order of the lines
    parses: bool  # with the prompt, after dropping up to `TRAILING_LINES` last lines
    empty: bool  # nothing that does anything

    @property
    def characters(self) -> int:
        return len(self.body)

    @property
    def lines(self) -> int:
        """Lines that are not blank."""
        return sum(bool(line.strip()) for line in _lines(self.body))

    @property
    def clean(self) -> bool:
        """Free of style violations, and not empty, whatever its syntax."""
        return not self.violations and not self.empty

    @property
    def issues(self) -> int:
        """Style violations, plus one if the body does not parse."""
        return len(self.violations) + (not self.parses)


def lint(prompt: str, continuation: str, *, finished: bool = False) -> Lint:
    """Judge a continuation of a prompt; about 1 ms.

    `finished`: the policy ended the text itself, so that its last line is whole even
    without a newline. The code is parsed and tokenized, never run.
    """
    whole, newline, rest = continuation.rpartition("\n")
    body = whole + newline + (rest if finished else "")
    return Lint(body, _violations(prompt, body), *_syntax(prompt, body))


def feedback(lint: Lint) -> str:
    """The hits as one sentence: the most frequent codes first, `no issues` without any.

    `E225 missing whitespace around operator x2; W291 trailing whitespace`
    """
    if lint.empty:
        return NO_CODE
    parts = [] if lint.parses else [SYNTAX_ERROR]
    counts = Counter(violation.code for violation in lint.violations)
    messages = {violation.code: violation.message for violation in reversed(lint.violations)}
    for code, count in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        times = f" x{count}" if count > 1 else ""
        parts.append(f"{code} {_MESSAGE_DETAIL.sub('', messages[code])}{times}")
    named = parts[:NAMED_CODES] + (["and more"] if len(parts) > NAMED_CODES else [])
    return "; ".join(named) or NO_ISSUES


def reward(lint: Lint) -> float:
    """Issues per line, negated: `-(violations + [does not parse]) / max(lines, 3)`, at most 0.

    The floor of three lines keeps one hit in a one-liner from weighing as much as a hit in every
    line. An empty body gets `EMPTY_REWARD`, like the sloppiest bodies (four violations in every
    line), and not the 0 that the formula would give it.
    """
    return EMPTY_REWARD if lint.empty else -lint.issues / max(lint.lines, MIN_REWARD_LINES)


def score(lint: Lint) -> int:
    """A score from 0 to 3 by issues per line, for methods that bucket by score.

    3: no issue. 2: at most one in three lines, a slip. 1: at most one per line, careless. 0: more,
    a different style, or an empty body. 3 coincides with the feedback `no issues`.
    """
    issues_per_line = -reward(lint)
    return 3 if issues_per_line == 0 else 2 if issues_per_line <= 1 / 3 else int(issues_per_line <= 1)


def category(lint: Lint) -> str:
    """The score in words, from a closed set, for methods that condition on a category."""
    return CATEGORIES[3 - score(lint)]


def spans(lint: Lint, prompt: str) -> list[tuple[int, int, str]]:
    """Where the violations are: (start, end, code) in characters of the body, in order, without repeats.

    pycodestyle reports a line and a column. The token at the column is marked; for indentation
    (E1, W1) the blanks before it.
    """
    lines = _lines(lint.body)
    starts = [0, *itertools.accumulate(map(len, lines))]
    header = len(prompt.rpartition("\n")[2])
    found = set()
    for violation in lint.violations:
        # The rest of the header's line is the first line of the body.
        column = violation.column - header if violation.line == 0 else violation.column
        if violation.line >= len(lines):
            continue  # at the end of the text, after the last line
        line = lines[violation.line]
        column = min(max(column, 0), len(line))
        if violation.code[:2] in ("E1", "W1") and line[:column].isspace():
            first, last = 0, column
        else:
            token = _SPAN.match(line, column)
            first, last = token.span() if token else (column, column)
        if last > first:
            found.add((starts[violation.line] + first, starts[violation.line] + last, violation.code))
    return sorted(found)


def columns(lint: Lint) -> dict[str, int | bool]:
    """One row of the evaluation table: counts for rates and degeneration guards.

    Violations per 1,000 characters is 1000 * sum(violations) / sum(characters) over samples, not
    a mean of ratios, so that short samples do not count more than long ones.
    """
    lines = _lines(lint.body)
    return {
        "violations": len(lint.violations),
        "issues": lint.issues,
        "characters": lint.characters,
        "lines": lint.lines,
        "clean": lint.clean,
        "parses": lint.parses,
        "empty": lint.empty,
        "one_liner": lint.lines <= 1,
        "blank_lines": len(lines) - lint.lines,
        "comment_lines": sum(line.lstrip().startswith("#") for line in lines),
        "whitespace_characters": sum(map(str.isspace, lint.body)),
        "python_tokens": len(python_tokens(lint.body)),
    }


def python_tokens(text: str) -> list[str]:
    """Words and single punctuation characters: the units of distinct-n, independent of the tokenizer."""
    return _PYTHON_TOKEN.findall(text)


class _EveryHit(pycodestyle.BaseReport):  # type: ignore[misc]  # it has no types
    """A report that keeps every hit; the base class keeps counts and first messages only."""

    def __init__(self, options: object) -> None:
        super().__init__(options)
        self.hits: list[tuple[int, int, str, str]] = []

    def error(self, line_number: int, offset: int, text: str, check: object) -> None:
        if not self._ignore_code(text[:4]):
            self.hits.append((line_number, offset, text[:4], text[5:]))


@functools.cache
def _options() -> object:
    """pycodestyle's options, all of them, because a setup.cfg nearby would fill in the rest."""
    return pycodestyle.StyleGuide(
        select=(),
        ignore=IGNORED_CODES,
        max_line_length=79,
        max_doc_length=None,
        indent_size=4,
        hang_closing=False,
        verbose=0,
        quiet=2,
    ).options


def _violations(prompt: str, body: str) -> tuple[Violation, ...]:
    """The style hits after the prompt's end; E704 is reported at the start of the header."""
    text = _NOQA.sub(r"\1__", prompt + body)  # a policy must not switch off its linter
    report = _EveryHit(_options())
    checker = pycodestyle.Checker(lines=_lines(text), options=_options(), report=report)
    with warnings.catch_warnings(action="ignore"):
        try:
            checker.check_all()
        except IndexError:
            # E12x loses count of the rows after an unclosed string in brackets. Such text does not
            # parse anyway; the hits before it are kept.
            if _parse(text) is not None:
                raise
    last, end = prompt.count("\n") + 1, len(prompt.rpartition("\n")[2])
    return tuple(
        Violation(code, message, line - last, column)
        for line, column, code, message in sorted(report.hits)
        if ((line, column) >= (last, end) or (line, code) == (last, "E704")) and not code.startswith("E9")
    )


def _syntax(prompt: str, body: str) -> tuple[bool, bool]:
    """Whether the sample parses, and whether its first function is empty."""
    lines = _lines(body)
    for dropped in range(min(TRAILING_LINES, len(lines)) + 1):
        tree = _parse(prompt + "".join(lines[: len(lines) - dropped]))
        if tree is not None:
            statements = getattr(tree.body[0], "body", tree.body) if tree.body else []
            return True, all(map(_does_nothing, statements))
    return False, all(map(_NOTHING.fullmatch, lines))


def _lines(text: str) -> list[str]:
    """The lines with their newlines; unlike with `splitlines`, form feeds and the like do not end one."""
    return io.StringIO(text, newline="\n").readlines()


def _parse(text: str) -> ast.Module | None:
    """The syntax tree, or None if the text does not parse."""
    with warnings.catch_warnings(action="ignore"):
        try:
            return ast.parse(text)
        except (SyntaxError, ValueError, MemoryError, RecursionError):  # what odd text can raise
            return None


def _does_nothing(statement: ast.stmt) -> bool:
    """`pass`, `...`, and strings or numbers as statements."""
    return isinstance(statement, ast.Pass) or (
        isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    )
