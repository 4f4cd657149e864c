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
    """A folder for experiments of one's own, before the shipped ones."""
    folder = tmp_path / "mine"
    monkeypatch.setenv("TEXTALIGN_EXPERIMENTS", f"{folder}:{PROJECT / 'experiments'}")
    return folder


def call(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


@pytest.mark.parametrize("template", [*SHIPPED.templates, "pep8_alt_lmu", "pep8_dpo"])
def test_an_adopted_experiment_is_the_template(mine: Path, template: str) -> None:
    done = call("new", "own", "--from", template)
    assert done.exit_code == 0, done.output
    library = Library((mine, PROJECT / "experiments"))
    ours, theirs = library.load("own"), SHIPPED.load(template)
    different = settings_diff(ours.model_dump(mode="json"), theirs.model_dump(mode="json"))
    assert all(line.startswith("control:") for line in different), different
    text = (mine / "own.yaml").read_text()
    assert text.startswith(f"# Written from {template}.") and "# Prompts drawn for each iteration" in text
    # Its control controls it, and trains exactly as the template's does.
    assert library.control_of("own") == (None if theirs.control is None else "own_no_feedback")
    if theirs.control is not None:
        ours, theirs = library.load("own_no_feedback"), SHIPPED.load(theirs.control)
        for stage in STAGES:
            if stage != "evaluation":  # which looks for models on the hub
                assert stage_settings(ours, stage, 2) == stage_settings(theirs, stage, 2)


def test_nothing_is_overwritten_and_names_are_checked(mine: Path) -> None:
    assert call("new", "own").exit_code == 0
    before = (mine / "own.yaml").read_text()
    for name, says in (("own", "own: an experiment of that name"), ("-x/y", "a name starts with")):
        done = call("new", "--", name)
        assert done.exit_code == 1 and says in done.output, done.output
    # The control's name is taken: neither file is written.
    (mine / "two_no_feedback.yaml").write_text("extends: own\n")
    done = call("new", "two")
    assert done.exit_code == 1 and "two_no_feedback: an experiment" in done.output
    assert not (mine / "two.yaml").exists() and (mine / "own.yaml").read_text() == before
    done = call("new", "three", "--from", "tldr_alt_rn")
    assert done.exit_code == 1 and "tldr_alt_rm" in done.output


def test_templates_are_not_run_before_they_are_adopted(mine: Path) -> None:
    done = call("run", "tldr_alt_rm")
    assert done.exit_code == 1 and "textalign new my_tldr_alt_rm --from tldr_alt_rm" in done.output
    mine.mkdir()
    (mine / "half.yaml").write_text("extends: tldr_alt_rm\n")
    done = call("validate", "half")
    assert done.exit_code == 1 and "control: tldr_no_feedback is a template" in done.output


def test_lists_and_the_grid_show_what_one_works_on(mine: Path) -> None:
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
