"""Whatever a user gets wrong: one message that names file, field and remedy, before anything costs."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.integration.conftest import Place, Ran
from textalign_dagster import PROJECT
from textalign_dagster.cli.main import main
from textalign_dagster.settings import merge, read_yaml, write_yaml

ONE_STAGE = str(Path(__file__).with_name("one_stage.py"))
POLICY = PROJECT / "textalign_dagster" / "tasks" / "pep8" / "policy"


def edited(place: Place, **changes: object) -> Path:
    """The toy with some fields changed, as the file ``mine.yaml``."""
    path = place.experiments / "mine.yaml"
    content = merge(read_yaml(place.experiments / "toy.yaml"), {"control": None, **changes})
    path.write_text(write_yaml(content), encoding="utf-8")
    return path


def model_without(place: Place, name: str) -> str:
    folder = place.folder / "model"
    shutil.copytree(POLICY, folder)
    (folder / name).unlink()
    return str(folder)


def prompts(place: Place, content: str) -> dict[str, dict[str, str]]:
    (place.experiments / "prompts.jsonl").write_text(content, encoding="utf-8")
    return {"prompts": {"path": "prompts.jsonl"}}


FILES: dict[str, tuple[Callable[[Place], object], list[str]]] = {
    "broken YAML": (
        lambda p: (p.experiments / "mine.yaml").write_text("method: [quark\nseed: 1"),
        ["mine.yaml:2:5: broken YAML"],
    ),
    "unknown method": (
        lambda p: edited(p, method="quak"),
        ["mine.yaml: method: unknown name 'quak' (did you mean 'quark'?)"],
    ),
    "unknown field": (
        lambda p: edited(p, training={"lerning_rate": 1e-3}),
        ["mine.yaml: training.lerning_rate: unknown field (did you mean 'learning_rate'?)"],
    ),
    "wrong type": (
        lambda p: edited(p, seed="one"),
        ["mine.yaml: seed: 'one' given, but it should be a whole number"],
    ),
    "missing prompt file": (
        lambda p: edited(p, prompts={"path": "nowhere.jsonl"}),
        ["mine.yaml: ", "nowhere.jsonl: no such prompt file"],
    ),
    "broken prompt file": (
        lambda p: edited(p, **prompts(p, '{"prompt": "a"}\n{"prompt":')),
        ["prompts.jsonl:2: not JSON"],
    ),
    "prompt file without the column": (
        lambda p: edited(p, **prompts(p, '{"text": "a"}')),
        ["prompts.jsonl: no column `prompt`; found text: rename one of them"],
    ),
    "too few prompts": (
        lambda p: edited(p, **prompts(p, '{"prompt": "a"}')),
        ["mine.yaml: prompts.per_iteration: 4 prompts requested in iteration 2", "can draw 1 of 1"],
    ),
    "trained and evaluated on the same": (
        lambda p: edited(p, **prompts(p, '{"prompt": "a"}'), evaluation={"path": "prompts.jsonl"}),
        ["mine.yaml: ", "prompts"],
    ),
    "no such policy": (
        lambda p: edited(p, policy={"model": "pep8-slopy-1m"}),
        ["mine.yaml: policy.model: ", "(did you mean 'pep8-sloppy-1m'?)"],
    ),
    "policy folder without weights": (
        lambda p: edited(p, policy={"model": model_without(p, "model.safetensors")}),
        ["mine.yaml: policy.model: ", "has no model.safetensors"],
    ),
    "policy folder without a tokenizer": (
        lambda p: edited(p, policy={"model": model_without(p, "tokenizer.json")}),
        ["mine.yaml: policy.model: ", "has no tokenizer"],
    ),
    "longer than the model": (
        lambda p: edited(p, sampling={"max_new_tokens": 250}),
        ["mine.yaml: sampling.max_new_tokens: 250 after a prompt of", "256 positions"],
    ),
    "a scenario longer than the model": (
        lambda p: edited(p, evaluation={"scenarios": {"long": {"max_new_tokens": 256}}}),
        ["mine.yaml: evaluation.scenarios.long.max_new_tokens: 256 after a prompt of", "256 positions"],
    ),
    "unknown control": (
        lambda p: edited(p, control="toy_nul"),
        ["mine.yaml: control: toy_nul: no such experiment (did you mean 'toy_null'?)"],
    ),
    "a control that controls nothing": (
        lambda p: edited(p, control="toy_null", seed=5),
        ["mine.yaml: control: toy_null differs upstream of training", "seed: 5 -> 0"],
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_a_bad_file_stops_the_run_before_anything(place: Place, case: str) -> None:
    spoil, says = FILES[case]
    spoil(place)
    told = place.textalign("run", str(place.experiments / "mine.yaml"), ok=False).stderr
    for part in says:
        assert part in told
    assert told.startswith("error: ")
    # One line a problem; a file that is too short to draw from may also be the one evaluated on.
    lines = told.removeprefix("error: ").strip().splitlines()
    assert len(lines) == (2 if case == "trained and evaluated on the same" else 1), lines
    assert not place.home.exists()  # nothing was started, and nothing is left behind


COMMANDS = {
    "unknown experiment": (["run", "toi"], ["error: toi: no such experiment (did you mean 'toy'?)"]),
    "no such file": (["run", "nowhere/toy.yaml"], ["nowhere/toy.yaml: no such file"]),
    "another kind of file": (["run", "README.md"], ["no such"]),
    "a file that is not YAML": (["run", "./README.md"], ["an experiment file ends in .yaml"]),
    "override without a value": (["run", "toy", "--set", "seed"], ["--set seed: write it as section.field=value"]),
    "override of nothing": (
        ["run", "toy", "--set", "sed=1"],
        ["toy.yaml with --set sed=1: sed: unknown field (did you mean 'seed'?)"],
    ),
    "override of the wrong type": (["run", "toy", "--set", "seed=x"], ["--set seed=x: seed: 'x' given"]),
    "override that is not YAML": (
        ["run", "toy", "--set", "method.template={condition} {prompt}"],
        ["if it is text, quote it: --set 'method.template="],
    ),
    "more iterations than the file has": (["run", "toy", "--iterations", "3"], ["toy.yaml has `iterations: 2`; raise it there"]),
    "no iteration": (["run", "toy", "-k", "0"], ["Invalid value for '--iterations'"]),
    "nothing to show": (["show", "toy"], ["toy has not been evaluated yet: textalign run toy"]),
    "broken SQL": (["sql", "selekt 1"], ["error: ", "selekt"]),
    "unknown table": (["sql", "from sample"], ["error: ", 'Did you mean "samples']),
    "unknown command": (["rnu", "toy"], ["No such command 'rnu'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", COMMANDS)
def test_a_bad_command_says_what_to_type_instead(place: Place, case: str) -> None:
    arguments, says = COMMANDS[case]
    told = place.textalign(*arguments, ok=False).stderr
    for part in says:
        assert part in told, told


def test_a_broken_neighbour_is_told_and_does_no_harm(place: Place) -> None:
    (place.experiments / "broken.yaml").write_text("a: [")
    done = place.textalign("experiments", ok=False)
    assert "broken.yaml:1:5: broken YAML" in done.stderr
    assert "toy " in done.stdout
    assert place.textalign("validate", "toy").returncode == 0


def test_iterations_out_of_order(place: Place) -> None:
    """As a click on iteration 2 in the UI, before there is an iteration 1."""
    done = place.textalign("toy|002", "generations", program=(ONE_STAGE,), ok=False)
    assert "generations of toy, iteration 2, builds on prompt_draws of iteration 2" in done.stderr
    place.textalign("toy|002", "prompt_draws", program=(ONE_STAGE,))
    done = place.textalign("toy|002", "generations", program=(ONE_STAGE,), ok=False)
    assert "builds on checkpoint of iteration 1" in done.stderr
    assert "materialize iteration 1 first" in done.stderr


def test_a_corrupt_artifact_is_named(ran: Ran, tmp_path: Path) -> None:
    place = ran.copy(tmp_path / "place")
    artifact = place.artifact("toy", 1, "feedback")
    file = Path(artifact.url("feedback"))
    file.write_bytes(file.read_bytes()[:-1])
    told = place.textalign("run", "toy", "--no-control", ok=False).stderr
    assert "feedback.parquet" in told and "bytes instead of" in told
    cells = json.loads(place.textalign("status", "toy", "--json").stdout)
    found = {cell["stage"]: cell["state"] for cell in cells if cell["iteration"] == 1}
    assert found["feedback"] == "unreadable"
    assert found["generations"] == "fresh"


def test_a_removed_artifact_is_made_anew(ran: Ran, tmp_path: Path) -> None:
    place = ran.copy(tmp_path / "place")
    before = place.artifact("toy", 1, "feedback")
    place.store.remove("feedback", before.key)
    assert "not in the store" in place.textalign("status", "toy").stdout
    output = place.textalign("run", "toy", "--no-control").stdout
    assert "toy|002  up to date" in output
    assert place.artifact("toy", 1, "feedback").frame("feedback").equals(ran.frame("toy", 1, "feedback"))


@pytest.mark.parametrize("home", ["file/home", "file"])
def test_a_home_that_cannot_be_written_to(place: Place, home: str) -> None:
    (place.folder / "file").write_text("")
    elsewhere = Place(place.folder)
    env = {**elsewhere.env, "TEXTALIGN_HOME": str(place.folder / home)}
    from tests.toy import textalign

    told = textalign("run", "toy", env=env, ok=False).stderr
    assert told.startswith(f"error: {place.folder / home}: cannot be written to")
    assert "set TEXTALIGN_HOME" in told


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 3 MB; only root can make one."""
    folder = tmp_path / "small"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if os.geteuid() != 0 or made.returncode:
        pytest.skip("mounting a small disk needs root")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_run_that_does_not_fit_is_refused_before_it_begins(place: Place, small_disk: Path) -> None:
    from tests.toy import textalign

    env = {**place.env, "TEXTALIGN_HOME": str(small_disk / "home")}
    told = textalign("run", "toy", env=env, ok=False).stderr
    assert re.fullmatch(
        rf"error: {small_disk}/home: 3\.0 MiB free, and the run needs about \d+ MiB; free some space, .*\n",
        told,
    ), told
    assert not list((small_disk / "home" / "dagster").glob("*"))


def test_a_disk_that_fills_up_is_named_and_nothing_is_published(
    place: Place, ran: Ran, small_disk: Path
) -> None:
    from tests.toy import textalign

    # All but the checkpoint is there: its weights are what does not fit.
    shutil.copytree(
        ran.home / "store", small_disk / "store", ignore=shutil.ignore_patterns("checkpoint*", "002")
    )
    env = {**place.env, "TEXTALIGN_STORE": str(small_disk / "store")}
    told = textalign("toy|001", "checkpoint", env=env, ok=False, program=(ONE_STAGE,)).stderr
    assert "no space left on" in told.lower(), told
    assert not list((small_disk / "store").glob("artifacts/checkpoint/*/manifest.json"))


def test_a_history_without_room_is_one_sentence(
    place: Place, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dagster's own tables are the first to meet a disk that fills up after it was looked at."""
    for name, value in {**place.env, "TEXTALIGN_HOME": str(small_disk)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("textalign_dagster.cli.space.check_space", lambda *_: None)
    (small_disk / "ballast").write_bytes(bytes(shutil.disk_usage(small_disk).free - 300_000))
    done = CliRunner().invoke(main, ["run", "toy", "--no-control"])
    assert done.exit_code == 1, done.output
    assert re.search(
        rf"^error: no space left on {small_disk} \(0\.\d MiB left\): free some space", done.output, re.M
    )
    assert "Traceback" not in done.output and "sqlalche" not in done.output
