"""What the README and the docs tell people to type works, in the order they tell it."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import duckdb
import pytest

from resources.store import ArtifactStore
from resources.views import connect
from tests import forked
from tests.toy import QUICK, ToyModels, shipped_overrides
from tests.toy import environment as toy_environment
from textalign_dagster import PROJECT
from textalign_dagster.experiment.files import TEMPLATES, Library
from textalign_dagster.settings import merge, nested, parse_override, read_yaml, write_yaml

DOCS = [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))]
ELSEWHERE = {
    "make": "the README's two commands are CI itself",
    "source": "the environment is that of the test",
    "dagster": "test_daemon and test_ui run it",
    "duckdb": "the duckdb command is not a Python package",
    "python": "the benchmarks take minutes; training.pretrain has tests of its own",
    "export": "a setting of the shell",
    "pip": "installs",
}


def blocks(path: Path, language: str) -> list[str]:
    """The fenced blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


def commands(path: Path) -> list[str]:
    """The command lines of a page, without prompts and comments."""
    text = "\n".join(blocks(path, "bash") + blocks(path, "sh")).replace("\\\n", " ")
    lines = [re.sub(r"\s+#.*$", "", line).strip() for line in text.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


@pytest.fixture(scope="module")
def environment(
    tmp_path_factory: pytest.TempPathFactory, toy_models: ToyModels, judge_url: str
) -> dict[str, str]:
    """A home in which the shipped experiments are tiny, under their own names."""
    folder = tmp_path_factory.mktemp("docs")
    shipped = Library((PROJECT / "experiments", TEMPLATES))
    for name, path in shipped.paths.items():
        content = read_yaml(path)
        tiny = shipped_overrides(shipped.load(name), toy_models, judge_url)
        for override in (*tiny, "iterations=1"):
            content = merge(content, nested(*parse_override(override)))
        (folder / path.name).write_text(write_yaml(content), encoding="utf-8")
    (folder / "data").symlink_to(PROJECT / "experiments" / "data")
    (folder / "experiments").symlink_to(folder)  # docs name experiments/… from the project's folder
    return toy_environment(folder / "state", folder)


@pytest.mark.parametrize("page", DOCS, ids=lambda path: path.name)
def test_every_command_is_known(page: Path) -> None:
    for line in commands(page):
        assert line.split()[0] == "textalign" or line.split()[0] in ELSEWHERE, line


def test_the_commands_run(environment: dict[str, str]) -> None:
    done = set()
    lines = [(page.name, line) for page in DOCS for line in commands(page) if line.startswith("textalign ")]
    for page, line in [("make quickstart", "textalign run pep8_alt_lmu"), *lines]:
        if page == "benchmarks.md":  # its runs are of shipped experiments, which have a test of their own
            line = line.replace(" run ", " validate ").replace(" --no-control", "")
        if line in done or re.search(r"\b(NAME|EXPERIMENT)\b|my_?\w*\.yaml", line):
            continue
        done.add(line)
        arguments, folder = (
            shlex.split(line)[1:],
            Path(environment["TEXTALIGN_EXPERIMENTS"].split(os.pathsep)[0]),
        )
        if len(done) == 1:  # as it is typed
            command = [str(Path(sys.executable).with_name("textalign")), *arguments]
            result = subprocess.run(
                command, env=environment, cwd=folder, capture_output=True, text=True, timeout=600
            )
        else:
            result = forked.run(QUICK, arguments, env=environment, cwd=folder, text="", timeout=600)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"
    assert len(done) >= 8


def test_the_queries_of_the_docs_run(environment: dict[str, str]) -> None:
    store = ArtifactStore(f"{environment['TEXTALIGN_HOME']}/store")
    queries = [
        query for page in DOCS for block in blocks(page, "sql") for query in block.split(";") if query.strip()
    ]
    assert queries
    with connect(store) as database:
        for query in queries:
            try:
                database.execute(query)
            except duckdb.Error as error:
                pytest.fail(f"{query}\n{error}")
