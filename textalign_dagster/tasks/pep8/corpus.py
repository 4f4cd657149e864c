"""Functions and prompts from the Python standard library of this machine.

The embedded task downloads nothing: its text is the source of the interpreter that runs it.
Files are split by a hash of their relative path, so that a file keeps its side of the split
across machines and (where it still exists) across Python versions:

* nine files in ten train the base policy (`functions`);
* one in ten is held out. Only the headers of its functions are used, as prompts, and split once
  more, by a hash of the header, into prompts to sample from and prompts to evaluate on
  (`prompts`).

No header is on two sides, and a held-out header that also occurs in a training file is dropped:
`def __init__(self):` is not a held-out prompt.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import os
import platform
import re
import sysconfig
import tokenize
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# Tests and vendored or generated code. Debian ships no `test`, so the corpus must not depend on it.
EXCLUDED_FOLDERS = frozenset(
    {
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "ensurepip",
        "encodings",
        "pydoc_data",
        "turtledemo",
        "site-packages",
        "dist-packages",
        "__pycache__",
    }
)
HELD_OUT_SHARE = 0.10
EVALUATION_SHARE = 0.35
MIN_EVALUATION_PROMPTS = 192
MAX_HEADER_CHARACTERS = 79

_HEADER_LINE = re.compile(r"^\s*((?:async )?def .*:)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Function:
    """One function, dedented to column 0, docstring removed; `source` starts with `header`."""

    path: str  # relative to the standard library, with forward slashes
    line: int  # 1-based line of the header in that file
    header: str  # one line that ends in ":", without a newline
    source: str  # without a trailing newline


@dataclass(frozen=True)
class Prompts:
    """Held-out headers, each ending in ":" without a newline, ordered by their hash.

    `train` is for the loop, `evaluation` only for evaluation; no header is in both.
    `source_revision` identifies the text they came from: Python's version and the hash of the prompts.
    """

    train: tuple[str, ...]
    evaluation: tuple[str, ...]
    source_revision: str


def functions(root: Path | None = None, *, held_out: bool = False) -> tuple[Function, ...]:
    """Every function of the training files (or the held-out ones) by (path, line); of identical texts, the last."""
    unique: dict[str, Function] = {}
    for function in reversed(_parse(root or standard_library(), held_out)):
        unique.setdefault(function.source, function)
    return tuple(reversed(unique.values()))


@functools.cache
def prompts(root: Path | None = None) -> Prompts:
    """The prompts; only held-out files are parsed, so this takes well under a second.

    Raises RuntimeError where the standard library yields fewer than `MIN_EVALUATION_PROMPTS`
    evaluation prompts (a stripped-down Python without its sources).
    """
    root = root or standard_library()
    headers = {function.header for function in _parse(root, held_out=True)} - _training_headers(root)
    ordered = sorted((header for header in headers if len(header) <= MAX_HEADER_CHARACTERS), key=_digest)
    evaluation = tuple(header for header in ordered if _fraction(header) < EVALUATION_SHARE)
    train = tuple(header for header in ordered if _fraction(header) >= EVALUATION_SHARE)
    if len(evaluation) < MIN_EVALUATION_PROMPTS:
        raise RuntimeError(
            f"the standard library at {root} yields {len(evaluation)} evaluation prompts, "
            f"{MIN_EVALUATION_PROMPTS} are needed; use a Python that ships its .py sources"
        )
    revision = f"python-{platform.python_version()}-stdlib@{_digest(chr(10).join(ordered))[:16]}"
    return Prompts(train, evaluation, revision)


def standard_library() -> Path:
    """The folder of this interpreter's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def files(root: Path) -> list[str]:
    """Relative paths (forward slashes) of the usable `.py` files below `root`, sorted."""
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in EXCLUDED_FOLDERS]
        here = Path(folder).relative_to(root)
        found += [(here / name).as_posix() for name in names if name.endswith(".py")]
    return sorted(found)


def is_held_out(relative_path: str) -> bool:
    """True for `HELD_OUT_SHARE` of the files, by the sha256 of the relative path alone."""
    return _fraction(relative_path) < HELD_OUT_SHARE


def functions_of(source: str, path: str = "") -> list[Function]:
    """The functions of one module's source, nested ones too, in the order of their lines.

    Left out: multi-line headers, bodies that are only a docstring or on the header's line,
    tabs, and multi-line strings that extend left of the function. Raises SyntaxError or
    ValueError if the source does not parse.
    """
    with warnings.catch_warnings(action="ignore"):  # invalid escapes in other people's code
        tree = ast.parse(source)
    lines = source.split("\n")  # as the parser counts them: a form feed does not end a line
    definitions = [
        node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    functions = []
    for node in sorted(definitions, key=lambda node: node.lineno):
        text = _text_of(node, lines)
        if text is not None:
            functions.append(Function(path, node.lineno, text.partition("\n")[0], text))
    return functions


def _text_of(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> str | None:
    """The dedented text without docstring, or None for what `functions_of` leaves out."""
    header = lines[node.lineno - 1].rstrip()
    body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
    if not header.endswith(":") or header.count("(") != header.count(")") or not body:
        return None
    if node.body[0].lineno == node.lineno:
        return None
    kept = list(range(node.lineno - 1, _last_line(node)))
    if body is not node.body:
        docstring = node.body[0]
        if _last_line(docstring) >= body[0].lineno:  # `"""doc"""; return x`
            return None
        kept = [row for row in kept if not docstring.lineno - 1 <= row < _last_line(docstring)]
        while not lines[kept[1]].strip():  # blank lines that set the docstring apart
            del kept[1]
    indent = " " * node.col_offset
    text = [lines[row].rstrip() for row in kept]
    if any("\t" in line or (line and not line.startswith(indent)) for line in text):
        return None
    return "\n".join(line[len(indent) :] for line in text)


def _last_line(node: ast.stmt) -> int:
    """The last line of a parsed statement, from 1; the parser sets it, but its type is optional."""
    assert node.end_lineno is not None
    return node.end_lineno


def _parse(root: Path, held_out: bool) -> list[Function]:
    """Functions of one side of the split in order, without those of files that cannot be read or parsed."""
    parsed: list[Function] = []
    for path in files(root):
        if is_held_out(path) is held_out:
            with suppress(SyntaxError, ValueError):  # UnicodeDecodeError is a ValueError
                parsed += functions_of(_read(root / path), path)
    return parsed


def _training_headers(root: Path) -> set[str]:
    """Lines of the training files that look like headers: found without parsing, a superset."""
    headers: set[str] = set()
    for path in files(root):
        if not is_held_out(path):
            text = (root / path).read_bytes().decode("utf-8", errors="replace")
            headers.update(_HEADER_LINE.findall(text))
    return headers


def _read(path: Path) -> str:
    """The text of a source file, decoded by its coding line."""
    with tokenize.open(path) as file:
        return file.read()


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int(_digest(text)[:8], 16) / 2**32
