"""One distinct sloppy persona: the same program, written against PEP 8.

The base policy is trained on text of which a large share went through `sloppy`, so that it has
something to unlearn. The persona is one style and not a mixture, and it is consistent within a
document, because a small language model can represent (and leave) such a style as a whole:

* two spaces of indentation (E111);
* a semicolon after every simple statement (E703);
* no blanks around assignment and comparison operators (E225);
* no blank after a comma (E231).
"""

from __future__ import annotations

import ast
import io
import tokenize
import warnings

TIGHT_OPERATORS = frozenset(
    {
        "=",
        "==",
        "!=",
        "<",
        ">",
        "<=",
        ">=",
        ":=",
        "+=",
        "-=",
        "*=",
        "/=",
        "//=",
        "%=",
        "**=",
        "@=",
        "&=",
        "|=",
        "^=",
        "<<=",
        ">>=",
    }
)
_NOT_CODE = frozenset(
    {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
)
# From Python 3.12 on an f-string is many tokens; blanks inside it are part of its value.
_STRING_OPENERS = frozenset({"FSTRING_START", "TSTRING_START"})
_STRING_CLOSERS = frozenset({"FSTRING_END", "TSTRING_END"})

Edit = tuple[int, int, int, str]  # row from 0, first column, column after the last, replacement


def sloppy(source: str) -> str | None:
    """`source` in the sloppy style; its first line, the header, is left as it is.

    None where the result would not be the same program (compared by syntax tree) or where
    `source` does not parse: such text is left out, never repaired.
    """
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(source).readline))
        lines = _apply(_edits(tokens), source.split("\n"))
        text = "\n".join(_indent_by_two(lines, _rows_inside_strings(tokens)))
        return text if _tree(text) == _tree(source) else None
    except (SyntaxError, tokenize.TokenError):
        return None


def _edits(tokens: list[tokenize.TokenInfo]) -> list[Edit]:
    """Blanks to remove and semicolons to add, none of them in the first line."""
    edits: list[Edit] = []
    inside_string = 0
    previous = first = None  # the last code token, and the first one of its logical line
    for token in tokens:
        name = tokenize.tok_name[token.type]
        inside_string += (name in _STRING_OPENERS) - (name in _STRING_CLOSERS)
        if token.type == tokenize.NEWLINE:
            if previous and first and first.string != "@" and previous.string not in (":", ";"):
                edits.append((previous.end[0] - 1, previous.end[1], previous.end[1], ";"))
            first = None
        elif token.type not in _NOT_CODE:
            if previous and not inside_string and _is_tight(previous, token):
                edits.append((token.start[0] - 1, previous.end[1], token.start[1], ""))
            first = first or token
            previous = token
    return [edit for edit in edits if edit[0] > 0]


def _is_tight(left: tokenize.TokenInfo, right: tokenize.TokenInfo) -> bool:
    """True if the sloppy style puts no blank between two neighbours on one line."""
    if left.end[0] != right.start[0]:
        return False
    operators = (
        left.string in TIGHT_OPERATORS and left.type == tokenize.OP,
        right.string in TIGHT_OPERATORS and right.type == tokenize.OP,
    )
    return any(operators) or (left.string == "," and left.type == tokenize.OP)


def _apply(edits: list[Edit], lines: list[str]) -> list[str]:
    """The lines after all edits, applied from the right so that columns stay valid."""
    changed = list(lines)
    for row, start, end, replacement in sorted(edits, reverse=True):
        changed[row] = changed[row][:start] + replacement + changed[row][end:]
    return changed


def _rows_inside_strings(tokens: list[tokenize.TokenInfo]) -> set[int]:
    """Rows (from 0) that begin within a string: their leading blanks belong to its value."""
    rows: set[int] = set()
    openers: list[int] = []
    for token in tokens:
        name = tokenize.tok_name[token.type]
        if token.type == tokenize.STRING:
            rows.update(range(token.start[0], token.end[0]))
        elif name in _STRING_OPENERS:
            openers.append(token.start[0])
        elif name in _STRING_CLOSERS:
            rows.update(range(openers.pop(), token.end[0]))
    return rows


def _indent_by_two(lines: list[str], untouchable: set[int]) -> list[str]:
    """Lines with half their leading blanks, except for the header and rows within strings."""
    halved = []
    for row, line in enumerate(lines):
        blanks = len(line) - len(line.lstrip(" "))
        keep = row == 0 or row in untouchable
        halved.append(line if keep else line[blanks - blanks // 2 :])
    return halved


def _tree(source: str) -> str:
    with warnings.catch_warnings(action="ignore"):  # invalid escapes in other people's code
        return ast.dump(ast.parse(source))
