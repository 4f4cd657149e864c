"""The corpus: what counts as a function, which side of the split it is on, and that the split is fixed."""

import ast
import textwrap
from pathlib import Path

import pytest

from textalign_dagster.tasks.pep8 import corpus

MODULE = textwrap.dedent('''
    class Stack:
        def push(self, item):
            """Put an item on top."""

            self.items.append(item)

            return self

        def size(self): return len(self.items)

        def documented(self):
            """Nothing but a docstring."""

        def long(self,
                 header):
            return header


    @cached
    async def fetch(url: str) -> bytes:
        def inner(x):
            return x
        return inner(url)
''')


def test_functions_are_dedented_and_lose_their_docstring():
    push, fetch, inner = corpus.functions_of(MODULE, "stack.py")

    assert push.source == "def push(self, item):\n    self.items.append(item)\n\n    return self"
    assert (push.path, push.line, push.header) == ("stack.py", 3, "def push(self, item):")
    assert fetch.header == "async def fetch(url: str) -> bytes:"  # without the decorator
    assert inner.source == "def inner(x):\n    return x"


def test_functions_with_a_multiline_string_left_of_their_indentation_are_left_out():
    source = "class A:\n    def f(self):\n        return '''\nleft\n'''\n"
    assert corpus.functions_of(source) == []


def test_a_form_feed_does_not_end_a_line():
    (function,) = corpus.functions_of("x = 1\n\x0c\ndef f():\n    return 1\n")
    assert (function.line, function.source) == (3, "def f():\n    return 1")


def test_every_function_parses_and_starts_with_its_header():
    functions = corpus.functions(held_out=True)
    for function in functions:
        ast.parse(function.source)
        assert function.source.startswith(function.header + "\n")
        assert function.header.endswith(":")
    assert len({function.source for function in functions}) == len(functions)
    assert list(functions) == sorted(functions, key=lambda f: (f.path, f.line))


def test_the_split_depends_on_the_path_alone():
    # int(sha256(path).hexdigest()[:8], 16) / 2**32 is 0.786, 0.231, 0.047, 0.096
    paths = ["argparse.py", "json/decoder.py", "secrets.py", "subprocess.py"]
    assert [corpus.is_held_out(path) for path in paths] == [False, False, True, True]


def test_prompts_are_disjoint_from_each_other_and_from_training_text():
    prompts = corpus.prompts()
    train, evaluation = set(prompts.train), set(prompts.evaluation)

    assert len(train) == len(prompts.train) and len(evaluation) == len(prompts.evaluation)
    assert len(evaluation) >= corpus.MIN_EVALUATION_PROMPTS and len(train) >= 160
    assert not train & evaluation
    assert not (train | evaluation) & {f.header for f in corpus.functions()}
    assert all(prompt.endswith(":") and "\n" not in prompt for prompt in train | evaluation)


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A standard library of one held-out module with 900 functions, and one for training."""
    (tmp_path / "secrets.py").write_text(
        "\n\n".join(f"def function_{number}(x):\n    return x\n" for number in range(900))
    )
    (tmp_path / "argparse.py").write_text("class A:\n    def function_7(x):\n        return 1\n")
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "secrets.py").write_text("def excluded():\n    return 1\n")
    corpus.prompts.cache_clear()
    return tmp_path


def test_a_header_seen_in_training_is_not_a_prompt(library: Path):
    prompts = corpus.prompts(library)
    assert "def function_7(x):" not in prompts.train + prompts.evaluation
    assert len(prompts.train) + len(prompts.evaluation) == 899


def test_unreadable_files_are_skipped(library: Path):
    (library / "ast.py").write_text("def f(:\n")
    (library / "json").mkdir()
    (library / "json" / "decoder.py").write_bytes(b"x = '\xff'\n")
    assert [function.header for function in corpus.functions(library)] == ["def function_7(x):"]


def test_the_source_revision_changes_with_the_prompts_only(library: Path):
    before = corpus.prompts(library)
    corpus.prompts.cache_clear()
    (library / "test" / "more.py").write_text("def excluded_too():\n    return 1\n")
    assert corpus.prompts(library) == before

    corpus.prompts.cache_clear()
    (library / "subprocess.py").write_text("def one_more(x):\n    return x\n")
    assert corpus.prompts(library).source_revision != before.source_revision


def test_a_python_without_sources_is_rejected(tmp_path: Path):
    with pytest.raises(RuntimeError, match="0 evaluation prompts, 192 are needed"):
        corpus.prompts(tmp_path)
