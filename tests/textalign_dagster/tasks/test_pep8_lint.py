"""The linter as critic: hits, feedback, reward and score of bodies judged by hand."""

import sys
import time
from pathlib import Path

import polars as pl
import pytest

from textalign_dagster.tasks.pep8 import Pep8
from textalign_dagster.tasks.pep8.lint import (
    CATEGORIES,
    EMPTY_REWARD,
    Violation,
    category,
    columns,
    feedback,
    lint,
    python_tokens,
    reward,
    score,
    spans,
)

HEADER = "def f(x, y):"
SLOPPY = "\n  a=g(x,y);\n  return a;\n"


def codes(continuation: str, prompt: str = HEADER) -> list[str]:
    return [violation.code for violation in lint(prompt, continuation).violations]


def test_every_hit_is_recorded_with_its_position():
    result = lint(HEADER, SLOPPY)
    assert result.violations == (
        Violation("E111", "indentation is not a multiple of 4", 1, 2),
        Violation("E225", "missing whitespace around operator", 1, 3),
        Violation("E231", "missing whitespace after ','", 1, 7),
        Violation("E703", "statement ends with a semicolon", 1, 10),
        Violation("E111", "indentation is not a multiple of 4", 2, 2),
        Violation("E703", "statement ends with a semicolon", 2, 10),
    )
    assert (result.lines, result.characters, result.parses, result.empty) == (2, 25, True, False)
    assert not result.clean and result.issues == 6


def marked(continuation: str, prompt: str = HEADER) -> list[tuple[str, str]]:
    """The marked texts with their codes."""
    return [(continuation[a:b], code) for a, b, code in spans(lint(prompt, continuation), prompt)]


def test_spans_are_what_the_linter_points_at():
    assert marked(SLOPPY) == [
        *[("  ", "E111"), ("=", "E225"), (",", "E231"), (";", "E703")],
        *[("  ", "E111"), (";", "E703")],
    ]


def test_spans_on_the_header_line_and_none_where_nothing_is_wrong():
    assert marked("  \n    return x\n") == [("  ", "W291")]
    assert marked("\n    return x\n") == [] == marked("")
    assert marked(" return x\n")[0][1] == "E704"
    # Hits in the prompt are not marked, nor are those after the last whole line.
    assert marked("\n    return x\n  y=1", prompt="def f(x,y):") == []


def test_only_whole_lines_count():
    assert lint(HEADER, "\n    return x\n  y=1").body == "\n    return x\n"
    assert lint(HEADER, "\n    return x").empty  # no whole line at all
    assert lint(HEADER, "\n    return x", finished=True).clean


def test_hits_in_the_prompt_do_not_count_but_those_on_its_line_do():
    assert codes("\n    return x\n", prompt="def f(x,y):") == []
    assert codes("\n    return x\n", prompt="x=1\n\n\ndef f(x,y) :") == []
    assert codes("  \n    return x\n") == ["W291"]
    assert codes(" return x\n") == ["E704"]
    assert lint(HEADER, " return x\n").violations[0].line == 0


@pytest.mark.parametrize(
    "continuation",
    [
        "\n    return x\n\n\n",  # W391 blank line at end of file: depends on where the sample was cut
        "\n    return '\\d'\n",  # W605
        "\n    return x*2 + y\n",  # E226, off by default in pycodestyle
    ],
)
def test_ignored_codes(continuation: str):
    assert lint(HEADER, continuation).clean


def test_a_noqa_comment_does_not_switch_the_linter_off():
    line = "    return x" + " + y" * 30
    assert codes(f"\n{line}  # noqa\n") == ["E501"]


def test_a_configuration_file_in_the_working_directory_is_ignored(tmp_path: Path, monkeypatch):
    (tmp_path / "setup.cfg").write_text("[pycodestyle]\nignore = E111\nmax-line-length = 10\n")
    monkeypatch.chdir(tmp_path)
    sys.modules[lint.__module__]._options.cache_clear()
    assert codes("\n  return x + y + x + y\n") == ["E111"]


@pytest.mark.parametrize(
    ("continuation", "parses"),
    [
        ("\n    return x\n", True),
        ("\n    return x\n    y = (\n", True),  # one cut line is dropped
        ("\n    return x\n    y = (\n    1,\n    2,\n", True),  # three are dropped
        ("\n    return x\n    y = (\n    1,\n    2,\n    3,\n", False),  # four are not
        ("\n    return = x\n", False),
        ("\n    x = ')\n    y = 1\n    z = 1\n    w = 1\n    return w\n", False),
    ],
)
def test_syntax_is_reported_separately_from_style(continuation: str, parses: bool):
    result = lint(HEADER, continuation)
    assert result.parses is parses
    assert not any(violation.code.startswith("E9") for violation in result.violations)


@pytest.mark.parametrize(
    "continuation",
    [
        "",
        "\n",
        "\n\n\n\n",
        "\n    # a comment\n",
        "\n    pass\n",
        "\n    ...\n",
        "\n    'text'\n",
        "\n    pass\n    # more\n    1\n",
        "\n    # x\n  pass;\n    (\n",
        "\n    pass\n\n\ndef g():\n    return 1\n",  # another function does not count
    ],
)
def test_a_body_without_code_gets_the_lowest_reward(continuation: str):
    result = lint(HEADER, continuation)
    assert result.empty and not result.clean
    assert feedback(result) == "no code"
    assert (reward(result), score(result)) == (EMPTY_REWARD, 0)


@pytest.mark.parametrize(
    ("continuation", "sentence", "expected_reward", "expected_score"),
    [
        ("\n    return x\n", "no issues", 0.0, 3),
        # 1 hit in 4 lines
        (
            "\n    a = 1\n    b = 2\n    c=3\n    return a\n",
            "E225 missing whitespace around operator",
            -1 / 4,
            2,
        ),
        # 1 hit in 1 line, but at least 3 lines are counted
        ("\n    return(x)\n", "E275 missing whitespace after keyword", -1 / 3, 2),
        # a syntax error is one issue, named first: 2 issues in 5 lines
        (
            "\n    a=1\n    b b\n    c c\n    d d\n    return\n",
            "E999 syntax error; E225 missing whitespace around operator",
            -2 / 5,
            1,
        ),
        # 6 hits in 2 lines, of more than three codes
        (
            SLOPPY,
            "E111 indentation is not a multiple of 4 x2; E703 statement ends with a semicolon x2; "
            "E225 missing whitespace around operator; and more",
            -2.0,
            0,
        ),
        # details that vary from hit to hit are left out
        ("\n    return x\n\ndef g():\n    return 1\n", "E302 expected 2 blank lines", -1 / 3, 2),
    ],
)
def test_feedback_reward_and_score(continuation, sentence, expected_reward, expected_score):
    result = lint(HEADER, continuation)
    assert feedback(result) == sentence
    assert reward(result) == pytest.approx(expected_reward)
    assert score(result) == expected_score


def test_evaluation_columns():
    assert columns(lint(HEADER, "\n    # why\n    a=x\n\n    return a\n    cut")) == {
        "violations": 1,
        "issues": 1,
        "characters": 33,
        "lines": 3,
        "clean": False,
        "parses": True,
        "empty": False,
        "one_liner": False,
        "blank_lines": 2,
        "comment_lines": 1,
        "whitespace_characters": 19,
        "python_tokens": 7,
    }


def test_python_tokens():
    assert python_tokens("a_1 = f('é')\n") == ["a_1", "=", "f", "(", "'", "é", "'", ")"]


@pytest.mark.parametrize(
    "continuation",
    [
        # pycodestyle itself raises an IndexError here
        '\n    d = {".format(c=self.read(), (type(s),\n        t.encode("rite", ".enc or \\\n'
        "            f'<arg, 1\n        len(m) is\n",
        "\n    \x00\n",
        "\n\tx = 1\n        y = 2\n",
        "\n    x = 1\x0c\n    y = '\u2028'\n",
        "\n" + "(" * 300 + "\n",
        "\n    x = " + "-" * 5000 + "1\n",
    ],
)
def test_odd_text_is_linted_without_raising(continuation: str):
    lint(HEADER, continuation)


def test_fast():
    started = time.process_time()
    for _ in range(100):
        lint(HEADER, SLOPPY * 3)
    assert (time.process_time() - started) / 100 < 0.01  # about 1 ms; generous for loaded machines


@pytest.mark.parametrize(
    ("continuation", "points", "words"),
    [
        ("\n    return x\n", 3, "clean"),
        ("\n    a = x\n    b = y\n    return a, b;\n", 2, "minor issues"),
        ("\n  a = x\n  return a\n", 1, "some issues"),
        (SLOPPY, 0, "sloppy"),
        ("\n    pass\n", 0, "sloppy"),
    ],
)
def test_a_category_is_the_score_in_words(continuation, points, words):
    result = lint(HEADER, continuation)
    assert (score(result), category(result)) == (points, words)
    assert CATEGORIES[3 - points] == words


def test_the_task_gives_rewards_sentences_categories_and_judgments():
    samples = pl.DataFrame(
        {
            "sample_id": ["a", "b"],
            "prompt": HEADER,
            "text": [SLOPPY, "\n    return x\n"],
            "finish_reason": "length",
        }
    )
    rows = {kind: Pep8().feedback(samples, kind).drop("aspect", "reason") for kind in Pep8().kinds}
    assert rows["reward"].rows() == [("a", -2.0, None, None, "ok"), ("b", 0.0, None, None, "ok")]
    assert rows["category"].rows() == [("a", 0.0, "sloppy", None, "ok"), ("b", 3.0, "clean", None, "ok")]
    assert [row[:3] for row in rows["text"].rows()] == [("a", 0.0, None), ("b", 3.0, None)]
    assert rows["text"]["text"][1] == "no issues"
    assert rows["judgment"].rows() == [
        ("a", 0.0, "flawed", rows["text"]["text"][0], "ok"),
        ("b", 3.0, "perfect", None, "ok"),
    ]
    assert len({str(frame.schema) for frame in rows.values()}) == 1
