"""The command line: help with examples, JSON that parses, exit codes, and a quick start."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from tests.toy import environment, textalign
from textalign_dagster.cli.main import main
from textalign_dagster.experiment.files import Library
from textalign_dagster.settings import parse_yaml, validate

COMMANDS = sorted(main.commands)


def call(*arguments: str, text: str | None = None) -> Result:
    """Runs the command in this process."""
    return CliRunner().invoke(main, arguments, input=text)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert call(command, "-h").output == result.output
    assert re.search(rf"^ +(duckdb .*)?.*textalign {command}\b", result.output, re.MULTILINE), result.output
    for option in re.findall(r"^  (--?\S+.*)$", result.output, re.MULTILINE):
        assert re.search(r"\s{2,}\S", option), f"{command} {option}: no explanation"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_examples_use_shipped_experiments(command: str) -> None:
    known = Library.default().paths
    for name in re.findall(r"textalign \S+ (pep8_\w+)", call(command, "--help").output):
        assert name in known


def test_commands_are_listed() -> None:
    output = call("--help").output
    for name, command in main.commands.items():
        assert name in output
        assert isinstance(command, click.Command)
        assert command.help
    assert call().exit_code == 2
    assert "textalign, version" in call("--version").output


def test_help_does_not_import_heavy_packages(home: Path) -> None:
    code = (
        "import sys\n"
        "from textalign_dagster.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'torch', 'transformers', 'dagster', 'duckdb', 'matplotlib', 'rich', 'accelerate'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    for arguments in (["--help"], ["run", "--help"], ["--version"]):
        subprocess.run(
            [sys.executable, "-c", code, *arguments], env=environment(home), check=True, capture_output=True
        )


def test_read_only_commands_do_not_import_torch_or_dagster(toys: Path) -> None:
    code = (
        "import sys\n"
        "from textalign_dagster.cli.main import main\n"
        "for arguments in (['status', 'toy'], ['validate', 'toy'], ['sql', 'select 1'], ['experiments']):\n"
        "    main(arguments, standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'dagster', 'accelerate'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    env = environment(toys.parent / "home", toys)
    subprocess.run([sys.executable, "-c", code], env=env, check=True, capture_output=True)


def test_experiments_are_listed(toys: Path) -> None:
    result = call("experiments")
    assert result.exit_code == 0
    assert re.search(r"^toy +As small as it gets\.$", result.output, re.MULTILINE)
    rows = json.loads(call("experiments", "--json").stdout)
    assert {"toy", "toy_null", "pep8_alt_lmu"} <= {row["name"] for row in rows}
    assert all(Path(row["file"]).is_file() for row in rows)


def test_show_config_is_an_experiment_file(toys: Path) -> None:
    from textalign_dagster.experiment import Experiment

    expected = Library.default().load("toy")
    shown = call("show-config", "toy")
    assert shown.exit_code == 0
    assert validate(Experiment, parse_yaml(shown.stdout, "shown"), "shown") == expected
    assert json.loads(call("show-config", "toy", "--json").stdout) == json.loads(expected.model_dump_json())


def test_experiment_given_as_a_path_finds_its_neighbours_and_the_shipped_ones(
    toys: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TEXTALIGN_EXPERIMENTS")
    assert call("validate", "toy").exit_code == 1
    assert call("validate", str(toys / "toy.yaml")).exit_code == 0
    monkeypatch.chdir(toys)
    assert call("validate", "./toy.yaml").exit_code == 0
    assert call("validate", "toy.yaml").exit_code == 0


def test_validate_with_overrides_writes_nothing(toys: Path, home: Path) -> None:
    result = call(
        "validate", "toy", "--set", "seed=3", "--set", "method=quark", "--set", "datapool.shares=null"
    )
    assert result.exit_code == 0, result.output
    assert "method quark, 2 iterations, seed 3" in result.output
    assert "null control: toy_null" in result.output
    assert not home.exists()


def test_status_before_any_run(toys: Path) -> None:
    cells = json.loads(call("status", "toy", "--json").stdout)
    assert [cell["state"] for cell in cells] == ["missing"] * 12
    assert "nothing has been run yet" in call("status").stdout
    shown = call("status", "--all").stdout
    (row,) = [line for line in shown.splitlines() if "toy " in line]
    assert "1–2" in row and "-" in row  # iterations that have not started share one row
    assert call("status", "toi").exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["show", "toy"], 1, "error: toy has not been evaluated yet: textalign run toy"),
        (["timing", "toy"], 1, "error: toy has no finished stage yet: textalign run toy"),
        (["validate", "toi"], 1, "error: toi: no such experiment (did you mean 'toy'?)"),
        (["validate", "toy", "--set", "seed=-1"], 1, "--set seed=-1: seed: -1 given"),
        (["validate"], 2, "Missing argument 'EXPERIMENT'"),
        (["run", "toy", "--iterations", "x"], 2, "'x' is not a valid integer range"),
        (["nonsense"], 2, "No such command 'nonsense'"),
        (["sql", "select * from datapool where nonsense"], 1, "error: "),
    ],
)
def test_exit_codes(toys: Path, arguments: list[str], code: int, message: str) -> None:
    result = call(*arguments)
    assert result.exit_code == code, result.output
    assert message in result.stderr
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_sql_of_empty_tables(toys: Path) -> None:
    assert json.loads(call("sql", "--json", "from datapool").stdout) == []
    assert json.loads(call("sql", "select 1 as a, null as b", "--json").stdout) == [{"a": 1, "b": None}]
    assert call("sql", "/* nothing */").exit_code == 0
    assert "pool_drawn" in textalign("sql", "describe samples", env=environment(toys.parent, toys)).stdout


def test_sql_cannot_write_to_the_tables(toys: Path) -> None:
    for query in (
        "drop view datapool",
        "delete from datapool",
        "insert into datapool select * from datapool",
    ):
        call("sql", query)
    assert call("sql", "from datapool").exit_code == 0


def test_the_sql_prompt_reads_from_stdin(toys: Path) -> None:
    text = "select 40 + 2\n as answer;\nselekt 1;\n\nselect 'last' as word"
    result = textalign("sql", text=text, env=environment(toys.parent / "home", toys))
    assert "42" in result.stdout and "answer" in result.stdout
    assert "last" in result.stdout  # terminated by the end of the input
    assert "error: " in result.stderr and "selekt" in result.stderr
    assert "sql>" not in result.stdout  # no prompt without a terminal
    assert textalign("sql", text="\n\n", env=environment(toys.parent / "home", toys)).stdout == ""


def test_catalog_of_an_empty_store(toys: Path, home: Path) -> None:
    path = Path(call("catalog").stdout.strip())
    assert path.is_file()
    assert home in path.parents
