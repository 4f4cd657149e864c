"""Experiments by name: extends, controls, variants."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from textalign_dagster import PROJECT
from textalign_dagster.experiment.files import Library, home, variants_folder
from textalign_dagster.methods import ForwardPrediction
from textalign_dagster.settings import SettingsError

SHIPPED = PROJECT / "experiments"
NULL = "{extends: base, method: no_feedback, control: null}"


@pytest.fixture
def folder(tmp_path: Path, home: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    write(
        folder, "base", "{task: pep8, method: quark, policy: {model: pep8-sloppy-1m}, control: null_of_base}"
    )
    write(folder, "null_of_base", NULL)
    return folder


def write(folder: Path, name: str, content: str) -> Path:
    path = folder / f"{name}.yaml"
    path.write_text(content, encoding="utf-8")
    return path


def control_error(library: Library, name: str) -> str:
    with pytest.raises(SettingsError) as caught:
        library.control_of(name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_everything_shipped_loads_and_has_a_valid_control() -> None:
    library = Library((SHIPPED,))
    good, bad = library.load_all()
    assert not bad
    assert list(good) == sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    for name, experiment in good.items():
        assert experiment.description
        # A reward model or a judge is not a policy, so there is nothing to control for.
        judge = isinstance(experiment.method, ForwardPrediction)
        if experiment.method.wants is not None and experiment.method.trains == "policy" and not judge:
            assert library.control_of(name), f"{name} ships without a null control"


def test_a_chain_of_extends_is_followed(folder: Path) -> None:
    write(folder, "b", "{extends: base, seed: 1, training: {epochs: 3.0, learning_rate: 1e-3}}")
    write(folder, "c", "{extends: b, training: {epochs: 4.0}}")
    found = Library((folder,)).load("c")
    assert (found.seed, found.training.epochs, found.training.learning_rate) == (1, 4.0, 1e-3)
    assert found.method.name == "quark"


def test_extends_may_name_an_experiment_of_another_folder(folder: Path) -> None:
    write(folder, "mine", "{extends: pep8_quark, seed: 7}")
    assert Library((folder, SHIPPED)).load("mine").seed == 7


def test_first_folder_with_a_name_wins(folder: Path) -> None:
    write(folder, "pep8_quark", "{extends: base, seed: 9}")
    assert Library((folder, SHIPPED)).load("pep8_quark").seed == 9
    assert Library((SHIPPED, folder)).load("pep8_quark").seed == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("me", "extends: me", "extends itself: me -> me"),
        ("cycle", "extends: cycle2", "extends itself: cycle -> cycle2 -> cycle"),
        ("orphan", "extends: bsae", "extends: bsae: no such experiment (did you mean 'base'?); known: "),
        ("list", "extends: [base]", "extends: give the name of one experiment"),
        ("empty", "", "expected fields such as"),
        ("broken", "a: [", "broken YAML"),
        ("nothing", "seed: 1", "task: missing; add it"),
        ("my experiment", "extends: base", "rename it"),
        ("-x", "extends: base", "rename it"),
        ("a|b", "extends: base", "rename it"),
    ],
)
def test_bad_file_is_reported_with_the_remedy(folder: Path, name: str, content: str, message: str) -> None:
    path = write(folder, name, content)
    write(folder, "cycle2", "extends: cycle")
    library = Library((folder,))
    with pytest.raises(SettingsError) as caught:
        library.load(name)
    assert message in str(caught.value)
    assert str(path) in str(caught.value) or str(folder / "cycle2.yaml") in str(caught.value)
    good, bad = library.load_all()
    assert set(good) == {"base", "null_of_base"}  # the other files still load
    assert name in bad


def test_unknown_name_lists_the_known_experiments(folder: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"bas: no such experiment \(did you mean 'base'\?\); known: base, "
    ):
        Library((folder,)).load("bas")
    with pytest.raises(SettingsError, match="known: none"):
        Library((folder / "nowhere",)).load("x")


def test_paths_are_relative_to_the_file_that_holds_them(folder: Path, tmp_path: Path) -> None:
    (folder / "prompts.csv").write_text("prompt\na\n")
    (folder / "model").mkdir()
    write(folder, "b", "{extends: base, prompts: {path: prompts.csv}, evaluation: {path: ../held.csv}}")
    write(folder, "m", "{extends: base, policy: {model: model}}")
    write(folder, "m2", "{extends: base, policy: {model: ./nowhere}}")
    write(folder, "hub", "{extends: base, policy: {model: owner/name}}")
    other = tmp_path / "other"
    other.mkdir()
    write(other, "c", "{extends: b, seed: 1}")
    library = Library((other, folder))
    for name in ("b", "c"):
        found = library.load(name)
        assert found.prompts.path == str(folder / "prompts.csv")
        assert found.evaluation.path == str(tmp_path / "held.csv")
    assert library.load("m").policy.model == str(folder / "model")
    assert library.load("m2").policy.model == str(folder / "nowhere")
    assert library.load("hub").policy.model == "owner/name"
    assert library.load("base").policy.model == "pep8-sloppy-1m"


def test_paths_of_scorers_and_baselines_are_relative_to_their_file(folder: Path, tmp_path: Path) -> None:
    (folder / "rm").mkdir()
    write(
        folder,
        "scored",
        "{extends: base, scorer: {name: reward_model, model: rm, check: {path: pairs.jsonl}}, "
        "evaluation: {scorer: {name: classifier, model: unitary/toxic-bert, label: toxic, good: false}, "
        "fluency_model: ./rm, scenarios: {other: {path: other.csv}}, baselines: {sft: ./rm, ppo: a/b}}}",
    )
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere", "extended", "{extends: scored, seed: 3}")
    found = Library((tmp_path / "elsewhere", folder)).load("extended").model_dump()
    assert found["scorer"]["model"] == str(folder / "rm")
    assert found["scorer"]["check"]["path"] == str(folder / "pairs.jsonl")
    assert found["evaluation"]["scorer"]["model"] == "unitary/toxic-bert"
    assert found["evaluation"]["fluency_model"] == str(folder / "rm")
    assert found["evaluation"]["scenarios"]["other"]["path"] == str(folder / "other.csv")
    assert found["evaluation"]["baselines"] == {"sft": str(folder / "rm"), "ppo": "a/b"}
    write(folder, "short", "{extends: base, scorer: toxicity, evaluation: {scorer: pii}}")
    short = Library((folder,)).load("short")
    assert short.scorer is not None and short.evaluation.scorer is not None
    assert (short.scorer.name, short.evaluation.scorer.name) == ("toxicity", "pii")


def test_a_control_is_checked(folder: Path) -> None:
    library = Library((folder,))
    assert library.control_of("base") == "null_of_base"
    assert library.control_of("null_of_base") is None
    write(folder, "a", "{extends: base, control: nul_of_base}")
    write(folder, "b", "{extends: base, control: a}")
    write(folder, "c", "{extends: base, sampling: {temperature: 0.5}, seed: 3}")
    write(folder, "d", "{extends: base, control: broken}")
    write(folder, "broken", "{extends: base, sed: 1}")
    library = Library((folder,))
    assert "control: nul_of_base: no such experiment (did you mean 'null_of_base'?)" in control_error(
        library, "a"
    )
    assert "control: a uses feedback (method quark); a null control has method no_feedback" in control_error(
        library, "b"
    )
    message = control_error(library, "c")
    assert "differs upstream of training" in message
    assert "sampling.temperature: 0.5 -> 1.0" in message
    assert "seed: 3 -> 0" in message
    assert "broken.yaml: sed: unknown field" in control_error(library, "d")


def test_a_control_may_differ_downstream(folder: Path) -> None:
    write(folder, "a", "{extends: base, datapool: {samples_per_bucket: 2}, training: {epochs: 1.0}}")
    assert Library((folder,)).control_of("a") == "null_of_base"


def test_no_variant_without_overrides(folder: Path, home: Path) -> None:
    assert Library((folder,)).variant("base", [], variants_folder()) == "base"
    assert not home.exists()


def test_control_without_a_scorer_ignores_scorer_overrides(folder: Path, home: Path) -> None:
    write(folder, "a", "{extends: base, scorer: {name: imported, path: x.jsonl}}")
    name = Library((folder,)).variant("a", ["scorer.path=y.jsonl", "seed=1"], home / "variants")
    both = Library((folder, home / "variants"))
    control = both.load(both.control_of(name) or "")
    assert control.scorer is None and control.seed == 1


def test_variant_is_a_separate_experiment_with_its_own_control(folder: Path, home: Path) -> None:
    library = Library((folder, variants_folder()))
    name = library.variant("base", ["seed=1", "sampling.temperature=0.8"], variants_folder())
    assert name == "base+sampling.temperature=0.8+seed=1"
    assert name == library.variant("base", ["sampling.temperature=0.8", "seed=1"], variants_folder())
    library = Library(library.folders)
    found = library.load(name)
    assert (found.seed, found.sampling.temperature) == (1, 0.8)
    assert library.load("base").seed == 0
    assert library.control_of(name) == "null_of_base+sampling.temperature=0.8+seed=1"
    assert library.load(library.control_of(name) or "").seed == 1
    assert not [p for p in variants_folder().iterdir() if p.name.startswith(".")]


def test_control_of_a_variant_keeps_its_method_and_buckets(folder: Path, home: Path) -> None:
    library = Library((SHIPPED, variants_folder()))
    overrides = ["method.ask_for=tidy", 'datapool.shares={"3": 1.0}', "datapool.samples=10"]
    name = library.variant("pep8_alt_lmu", overrides, variants_folder())
    library = Library(library.folders)
    control = library.load(library.control_of(name) or "")
    assert (control.method.name, control.datapool.shares, control.datapool.samples) == (
        "no_feedback",
        None,
        10,
    )
    assert library.load(name).datapool.shares == {"3": 1.0}


def test_shares_are_replaced_unless_a_single_one_is_named(folder: Path, home: Path) -> None:
    library = Library((SHIPPED, variants_folder()))
    before = library.load("pep8_alt_lmu").datapool.shares or {}
    single = library.variant(
        "pep8_alt_lmu", ["datapool.shares.3=0.9", "datapool.shares.0=0"], variants_folder()
    )
    whole = library.variant("pep8_alt_lmu", ["datapool.shares={'2': 1}"], variants_folder())
    library = Library(library.folders)
    assert library.load(single).datapool.shares == {**before, "3": 0.9, "0": 0}
    assert library.load(whole).datapool.shares == {"2": 1}
    with pytest.raises(SettingsError, match=r"datapool\.shares\.3: 'x' given"):
        library.overridden("pep8_alt_lmu", ["datapool.shares.3=x"])
    with pytest.raises(SettingsError, match="shares weighs the labels of samples"):
        library.overridden(
            "pep8_quark", ["datapool.samples=null", "datapool.fill=insertion", "datapool.shares.3=1"]
        )


def test_a_variant_without_a_control(folder: Path, home: Path) -> None:
    library = Library((folder, variants_folder()))
    name = library.variant("base", ["control=null", "seed=2"], variants_folder())
    assert Library(library.folders).control_of(name) is None
    assert [path.stem for path in variants_folder().iterdir()] == [name]
    assert library.variant("null_of_base", ["seed=2"], variants_folder()) == "null_of_base+seed=2"


def test_a_long_or_odd_label_becomes_a_hash(folder: Path, home: Path) -> None:
    library = Library((folder, variants_folder()))
    odd = library.variant("base", ['description="a|b/c"'], variants_folder())
    long = library.variant("base", [f"description={'x' * 100}"], variants_folder())
    assert odd != long
    for name in (odd, long):
        assert name.startswith("base+") and len(name) == len("base+") + 8
    assert odd == library.variant("base", ["description='a|b/c'"], variants_folder())  # same meaning
    assert Library(library.folders).load(odd).description == "a|b/c"


@pytest.mark.parametrize("value", ["'1e-4'", "'no'", "'0777'", "'~'", '"a\\nb\\x85c"', "'# a'"])
def test_strings_that_look_like_other_types_stay_strings(folder: Path, home: Path, value: str) -> None:
    library = Library((folder, variants_folder()))
    expected = library.overridden("base", [f"description={value}"]).description
    name = library.variant("base", [f"description={value}"], variants_folder())
    assert Library(library.folders).load(name).description == expected


@pytest.mark.parametrize(
    "override",
    [
        "sed=1",
        "seed=x",
        "method=quar",
        "training.learning_rate=-1",
        "seed",
        "a..b=1",
        "datapool.shares={a: 1}",
    ],
)
def test_nothing_is_written_for_a_bad_override(folder: Path, home: Path, override: str) -> None:
    with pytest.raises(SettingsError, match="--set"):
        Library((folder, variants_folder())).variant("base", ["iterations=2", override], variants_folder())
    assert not home.exists()


def test_path_in_an_override_is_relative_to_the_working_directory(
    folder: Path, tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_model").mkdir()
    library = Library((folder, variants_folder()))
    overrides = ["prompts.path=my.csv", "policy.model=my_model"]
    name = library.variant("base", overrides, variants_folder())
    library = Library(library.folders)
    for found in (library.overridden("base", overrides), library.load(name)):
        assert found.prompts.path == str(tmp_path / "my.csv")
        assert found.policy.model == str(tmp_path / "my_model")


def test_errors_mention_the_overrides(folder: Path) -> None:
    with pytest.raises(SettingsError, match=r"base\.yaml with --set seed=-1 --set iterations=2: seed: "):
        Library((folder,)).overridden("base", ["seed=-1", "iterations=2"])


def test_the_default_library(home: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Library.default().folders == (SHIPPED, home / "variants")
    monkeypatch.setenv("TEXTALIGN_EXPERIMENTS", f"{folder}{os.pathsep}{SHIPPED}")
    assert Library.default(Path("x")).folders == (Path("x"), folder, SHIPPED, home / "variants")


def test_home_is_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TEXTALIGN_HOME", "here")
    assert home() == tmp_path.resolve() / "here"
    monkeypatch.delenv("TEXTALIGN_HOME")
    assert home() == PROJECT / "state"
