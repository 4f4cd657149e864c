"""The sloppy persona: every edit by hand, and that the program stays the same."""

import ast
from collections import Counter

import pytest

from textalign_dagster.tasks.pep8 import corpus
from textalign_dagster.tasks.pep8.lint import lint
from textalign_dagster.tasks.pep8.sloppy import sloppy


@pytest.mark.parametrize(
    ("clean", "expected"),
    [
        # two spaces, a semicolon after every simple statement
        ("def f():\n    if x:\n        return\n    pass", "def f():\n  if x:\n    return;\n  pass;"),
        # no blanks around assignment and comparison; arithmetic and words are left alone
        ("def f():\n    a = b + 1 == c\n    a += 1", "def f():\n  a=b + 1==c;\n  a+=1;"),
        ("def f():\n    a = b in c and not d", "def f():\n  a=b in c and not d;"),
        # no blank after a comma, unless the line ends there
        ("def f():\n    g(x, y, k=1)", "def f():\n  g(x,y,k=1);"),
        ("def f():\n    g(x,\n      y)", "def f():\n  g(x,\n   y);"),
        # the semicolon goes before a comment; a comment on its own line is unchanged
        ("def f():\n    # why\n    a = 1  # one", "def f():\n  # why\n  a=1;  # one"),
        # decorators and headers take no semicolon; nested headers are sloppy, the first is not
        (
            "def f(a, b):\n    @d\n    def g(a, b):\n        return a",
            "def f(a, b):\n  @d\n  def g(a,b):\n    return a;",
        ),
    ],
)
def test_edits(clean: str, expected: str):
    assert sloppy(clean) == expected


def test_strings_keep_their_value():
    clean = 'def f():\n    a = """x = 1,\n        y, z"""\n    return f"{a, 1} = b"'
    assert sloppy(clean) == 'def f():\n  a="""x = 1,\n        y, z""";\n  return f"{a, 1} = b";'


@pytest.mark.parametrize("source", ["def f(:", "def f():\n    return (1", "def f():\nreturn 1"])
def test_source_that_does_not_parse_has_no_sloppy_form(source: str):
    assert sloppy(source) is None


def test_the_standard_library_keeps_its_meaning_and_loses_its_style():
    codes: Counter[str] = Counter()
    for function in corpus.functions(held_out=True)[:200]:
        text = sloppy(function.source)
        assert text is not None
        assert ast.dump(ast.parse(text)) == ast.dump(ast.parse(function.source))
        assert text.startswith(function.header + "\n")
        result = lint(function.header, text.removeprefix(function.header), finished=True)
        codes.update(violation.code for violation in result.violations)
    assert min(codes[code] for code in ("E111", "E703", "E225", "E231")) > 100, codes
