"""Templates: read and extended by name, never on the grid, adopted by `textalign new`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from textalign_dagster import PROJECT
from textalign_dagster.cli.main import main
from textalign_dagster.experiment.files import TEMPLATES, Library
from textalign_dagster.ids import settings_diff
from textalign_dagster.loop.stages import STAGES, stage_settings

SHIPPED = Library((PROJECT / "experiments",))


@pytest.fixture
def mine(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder for the user's own experiments, searched before the shipped ones."""
    folder = tmp_path / "mine"
    monkeypatch.setenv("TEXTALIGN_EXPERIMENTS", f"{folder}:{PROJECT / 'experiments'}")
    return folder


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.mark.parametrize("template", [*SHIPPED.templates, "pep8_alt_lmu", "pep8_dpo"])
def test_adopted_experiment_equals_the_template(mine: Path, template: str) -> None:
    result = call("new", "own", "--from", template)
    assert result.exit_code == 0, result.output
    library = Library((mine, PROJECT / "experiments"))
    ours, theirs = library.load("own"), SHIPPED.load(template)
    different = settings_diff(ours.model_dump(mode="json"), theirs.model_dump(mode="json"))
    assert all(line.startswith("control:") for line in different), different
    text = (mine / "own.yaml").read_text()
    assert text.startswith(f"# Written from {template}.") and "# Prompts drawn for each iteration" in text
    # Its control is valid and trains exactly as the template's does.
    assert library.control_of("own") == (None if theirs.control is None else "own_no_feedback")
    if theirs.control is not None:
        ours, theirs = library.load("own_no_feedback"), SHIPPED.load(theirs.control)
        for stage in STAGES:
            if stage != "evaluation":  # it looks for models on the hub
                assert stage_settings(ours, stage, 2) == stage_settings(theirs, stage, 2)


def test_nothing_is_overwritten_and_names_are_checked(mine: Path) -> None:
    assert call("new", "own").exit_code == 0
    before = (mine / "own.yaml").read_text()
    for name, message in (("own", "own: an experiment of that name"), ("-x/y", "a name starts with")):
        result = call("new", "--", name)
        assert result.exit_code == 1 and message in result.output, result.output
    # The control's name is taken: neither file is written.
    (mine / "two_no_feedback.yaml").write_text("extends: own\n")
    result = call("new", "two")
    assert result.exit_code == 1 and "two_no_feedback: an experiment" in result.output
    assert not (mine / "two.yaml").exists() and (mine / "own.yaml").read_text() == before
    result = call("new", "three", "--from", "tldr_alt_rn")
    assert result.exit_code == 1 and "tldr_alt_rm" in result.output


def test_templates_must_be_adopted_before_they_run(mine: Path) -> None:
    result = call("run", "tldr_alt_rm")
    assert result.exit_code == 1 and "textalign new my_tldr_alt_rm --from tldr_alt_rm" in result.output
    mine.mkdir()
    (mine / "half.yaml").write_text("extends: tldr_alt_rm\n")
    result = call("validate", "half")
    assert result.exit_code == 1 and "control: tldr_no_feedback is a template" in result.output


def test_lists_and_the_grid_leave_out_templates(mine: Path) -> None:
    assert "tldr_" not in call("experiments").output and "pep8_dpo" in call("experiments").output
    listed = call("experiments", "--templates").output
    assert all(name in listed for name in SHIPPED.templates) and "pep8_dpo" not in listed
    assert "nothing has been run yet" in call("status").output
    assert "pep8_dpo" in call("status", "--all").output
    code = "from textalign_dagster.loop.partitions import EXPERIMENTS, LAST_ITERATION as k; print(*EXPERIMENTS, k)"
    grid = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "pep8_dpo" in grid and "tldr" not in grid and grid.split()[-1] == "3"


def test_templates_are_read_by_name() -> None:
    assert set(SHIPPED.templates) == {path.stem for path in TEMPLATES.glob("*.yaml")}
    assert call("show-config", "hh_alt_lmc").exit_code == 0
