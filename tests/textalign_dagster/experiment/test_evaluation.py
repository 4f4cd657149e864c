"""Which prompts and conditions an evaluation has, and what is rejected before anything is sampled."""

from __future__ import annotations

import re
from pathlib import Path

import polars as pl
import pytest

from textalign_dagster import PROJECT
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.evaluation import (
    Asked,
    check_evaluation,
    conditions,
    evaluation_prompts,
    evaluation_scorer,
    evaluation_source,
    max_new_tokens,
    reference_answers,
)
from textalign_dagster.settings import SettingsError, merge, parse_yaml, validate


def experiment(**changes: object) -> Experiment:
    minimal = {
        "task": "pep8",
        "method": {"name": "alt_lmu", "ask_for": "good", "probe": ["bad", "odd"]},
        "policy": {"model": "m"},
    }
    result: Experiment = validate(Experiment, merge(minimal, changes), "x")
    return result


def test_the_exemplar_comes_first_then_the_probes() -> None:
    mine = experiment()
    assert conditions(mine, 0) == [Asked(None, "main")]
    assert conditions(mine, 1) == [Asked("good", "main"), Asked("bad", "probe"), Asked("odd", "probe")]
    assert conditions(experiment(evaluation={"probe": False}), 2) == [Asked("good", "main")]
    assert conditions(experiment(method={"name": "no_feedback"}), 2) == [Asked(None, "main")]


def prompt_files(tmp_path: Path, train: list[str], held_out: list[str]) -> dict[str, dict[str, object]]:
    for name, prompts in (("train", train), ("held_out", held_out)):
        pl.DataFrame({"prompt": prompts}).write_csv(tmp_path / f"{name}.csv")
    return {
        "prompts": {"path": str(tmp_path / "train.csv")},
        "evaluation": {"path": str(tmp_path / "held_out.csv"), "prompts": 2, "samples_per_prompt": 3},
    }


def test_held_out_prompts_have_seeds_that_do_not_depend_on_the_iteration(tmp_path: Path) -> None:
    files = prompt_files(tmp_path, ["a"], ["x", "y", "z"])
    prompts = evaluation_prompts(experiment(**files))
    assert prompts["prompt"].to_list() == ["x", "y"]
    assert prompts.columns == ["prompt_id", "prompt", "reference", "seeds"]
    seeds = prompts["seeds"].explode()
    assert len(seeds) == seeds.n_unique() == 6
    assert prompts.equals(evaluation_prompts(experiment(**files)))
    assert not seeds.equals(evaluation_prompts(experiment(**files, seed=1))["seeds"].explode())
    assert evaluation_source(prompts) == evaluation_source(evaluation_prompts(experiment(**files, seed=1)))


def test_a_prompt_in_both_files_is_contamination(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        evaluation_prompts(experiment(**prompt_files(tmp_path, ["a", "y"], ["x", "y"])))
    assert str(caught.value) == (
        f"evaluation.path: 1 prompts of {tmp_path / 'held_out.csv'} are trained on too, e.g. 'y'; "
        "remove them from one of the files"
    )


def test_the_tasks_own_held_out_prompts_cannot_be_trained_on(tmp_path: Path) -> None:
    own = experiment().task.prompts("evaluation")["prompt"].to_list()
    pl.DataFrame({"prompt": own[:1]}).write_csv(tmp_path / "train.csv")
    with pytest.raises(SettingsError, match="the held-out prompts of task pep8 are trained on too"):
        evaluation_prompts(experiment(prompts={"path": str(tmp_path / "train.csv")}))


def test_too_few_prompts(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"evaluation\.prompts: 2 requested, but there are only 1 in .*held_out\.csv"
    ):
        evaluation_prompts(experiment(**prompt_files(tmp_path, ["a"], ["x"])))


def answered(tmp_path: Path, references: list[str | None]) -> dict[str, dict[str, object]]:
    files = prompt_files(tmp_path, ["a"], ["x"])
    prompts = [f"x{i}:" for i in range(len(references))]
    pl.DataFrame({"prompt": prompts, "reference": references}).write_parquet(tmp_path / "answered.parquet")
    return merge(
        files, {"evaluation": {"path": str(tmp_path / "answered.parquet"), "prompts": len(references)}}
    )


def test_different_references_are_a_different_source(tmp_path: Path) -> None:
    source = evaluation_source(evaluation_prompts(experiment(**answered(tmp_path, ["a", "b"]))))
    assert source != evaluation_source(evaluation_prompts(experiment(**answered(tmp_path, ["a", "c"]))))


def test_references_continue_their_prompts_like_samples(tmp_path: Path) -> None:
    answers = reference_answers(
        evaluation_prompts(experiment(**answered(tmp_path, ["one", " two", None, " "])))
    )
    assert answers.select("prompt", "reference", "text").rows() == [
        ("x0:", "one", " one"),
        ("x1:", " two", " two"),
    ]
    ended = pl.DataFrame({"prompt_id": ["i"], "prompt": ["ends\n"], "reference": ["one"]})
    assert reference_answers(ended)["text"].to_list() == ["one"]


PATTERNS = {"name": "patterns", "keywords": ["bad"]}


def test_scorer_of_the_evaluation_takes_precedence() -> None:
    assert evaluation_scorer(experiment()) is None
    rewards = {"method": {"name": "quark"}, "scorer": PATTERNS}
    default = evaluation_scorer(experiment(**rewards))
    assert default is not None and default.name == "patterns"
    own = evaluation_scorer(experiment(**rewards, evaluation={"scorer": {"name": "pii"}}))
    assert own is not None and own.name == "pii"


JUDGE = {"model": "m", "api_key_env": None}


@pytest.mark.parametrize(
    ("changes", "references", "message"),
    [
        ({"sampling": {"max_new_tokens": 8, "min_new_tokens": 5}, "evaluation": {"max_new_tokens": 4}}, ["a", "b"],
         "evaluation.max_new_tokens: 4, but sampling.min_new_tokens is 5; raise it, or lower that one"),
        ({"evaluation": {"baselines": {"people": "references"}}}, [None, " "],
         "evaluation.baselines.people: the held-out prompts have no references; give a file with a column"),
        ({"evaluation": {"judge": {**JUDGE, "template": "win", "ask": "rating"}}}, ["a", "b"],
         "evaluation.judge.ask: 'rating', but the template win asks for 'win'; make them agree"),
        ({"evaluation": {"judge": {**JUDGE, "template": "ranking", "ask": "ranking"}}}, ["a", "b"],
         "evaluation.judge.ask: ranking compares a policy's samples with each other"),
        ({"evaluation": {"judge": {**JUDGE, "template": "win", "ask": "win"}}}, [None, None],
         "evaluation.judge.ask: win compares with references, and the held-out prompts have none"),
        ({"evaluation": {"judge": {"model": "m", "api_key_env": "NO_SUCH_KEY", "template": "win", "ask": "win"}}},
         ["a", "b"], "evaluation.judge.api_key_env: the environment variable NO_SUCH_KEY is not set"),
    ],
)  # fmt: skip
def test_impossible_evaluations_are_rejected_before_sampling(
    tmp_path: Path, changes: dict[str, object], references: list[str | None], message: str
) -> None:
    with pytest.raises(SettingsError) as caught:
        check_evaluation(experiment(**merge(answered(tmp_path, references), changes)))
    assert str(caught.value).startswith(message)


def test_imported_feedback_cannot_score_an_evaluation(tmp_path: Path) -> None:
    imported = {"name": "imported", "path": "feedback_{iteration}.jsonl", "format": "plain", "kind": "reward"}
    rewards = {"method": {"name": "quark"}}
    assert evaluation_scorer(experiment(**rewards, scorer=imported)) is None
    files = merge(answered(tmp_path, ["a", "b"]), {"evaluation": {"scorer": imported}})
    with pytest.raises(
        SettingsError, match=r"^evaluation\.scorer: imported returns no numbers for an evaluation's samples"
    ):
        check_evaluation(experiment(**files))


def test_examples_in_the_docs() -> None:
    page = (PROJECT / "docs" / "evaluation.md").read_text(encoding="utf-8")
    block, sampled, attacked, harness, ranked = re.findall(r"```yaml\n(.*?)```", page, re.S)
    best = experiment(**parse_yaml(ranked, "docs/evaluation.md")).evaluation.best_of_n
    assert best is not None and best.candidates == 32
    red_team = experiment(**parse_yaml(attacked, "docs/evaluation.md")).evaluation.red_team
    assert red_team is not None and red_team.shown == 4
    tasks = experiment(**parse_yaml(harness, "docs/evaluation.md")).evaluation.lm_eval
    assert tasks is not None and tasks.limit == 500
    scenarios = experiment(**parse_yaml(sampled, "docs/evaluation.md")).evaluation.scenarios
    assert scenarios["unprompted"].path is None and scenarios["signatures"].hits == 0
    evaluation = experiment(**parse_yaml(block, "docs/evaluation.md")).evaluation
    assert evaluation.baselines == {"SFT": "/models/sft", "people": "references"}
    assert evaluation.judge is not None and evaluation.scorer is not None


def test_valid_evaluation_is_accepted(tmp_path: Path) -> None:
    settings = {
        "max_new_tokens": 4,
        "baselines": {"people": "references"},
        "judge": {**JUDGE, "template": "win", "ask": "win"},
    }
    mine = experiment(**merge(answered(tmp_path, ["a", None]), {"evaluation": settings}))
    check_evaluation(mine)
    assert max_new_tokens(mine) == 4
    assert max_new_tokens(experiment(sampling={"max_new_tokens": 9})) == 9
