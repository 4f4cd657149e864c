"""A reward model that one experiment trains and another uses as its scorer."""

from __future__ import annotations

import json
import math
from itertools import combinations
from statistics import mean

import polars as pl
import pytest

from tests.integration.conftest import Place
from textalign_dagster.settings import write_yaml

RM = {
    "extends": "toy",
    "control": None,
    "method": {"name": "rm_rankings"},
    "iterations": 2,
    "sampling": {"max_new_tokens": 24},
    "datapool": {
        "drop_factor": 1.0,
        "samples": None,
        "max_tokens": None,
        "shares": None,
        "fill": "insertion",
    },
    "evaluation": {"prompts": 12, "samples_per_prompt": 3},
    "training": {"batch_size": 4, "objective": {"name": "bradley_terry"}},
}
POLICY = RM | {
    "method": {"name": "sft"},
    "iterations": 1,
    "scorer": {"name": "reward_model", "model": "toy_rm@2"},
    "evaluation": {"prompts": 12, "samples_per_prompt": 1, "best_of_n": {"n": [1, 3], "samples": 6}},
    "training": {"batch_size": 4},
}


@pytest.fixture
def both(place: Place) -> Place:
    for name, content in (("toy_rm", RM), ("toy_rewarded", POLICY)):
        (place.experiments / f"{name}.yaml").write_text(write_yaml(content), encoding="utf-8")
    return place


def test_policy_trained_with_another_experiments_reward_model(both: Place) -> None:
    refused = both.textalign("validate", "toy_rewarded", ok=False)
    assert "scorer.model: toy_rm@2: experiment toy_rm has no checkpoint of iteration 2 yet; run it first" in (
        " ".join((refused.stdout + refused.stderr).split())
    )

    shown = both.textalign("run", "toy_rm").stdout
    assert "pair accuracy" in shown
    # Both iterations sampled from the base policy: the trained model is not a policy.
    samples = [both.artifact("toy_rm", k, "generations").manifest["inputs"]["policy"] for k in (1, 2)]
    assert samples[0] == samples[1]
    assert {cell["state"] for cell in json.loads(both.textalign("status", "toy_rm", "--json").stdout)} == {
        "fresh"
    }
    scores = both.frame("toy_rm", 2, "evaluation", "scores")
    accuracy = scores.filter(metric="pair_accuracy").row(0, named=True)
    rewards = both.frame("toy_rm", 2, "evaluation", "rewards")
    assert rewards.height == 36 and rewards["reward"].null_count() == 0
    pairs = rewards.join(rewards, on="prompt_id", suffix="_worse").filter(
        pl.col("value") > pl.col("value_worse")
    )
    correct = (pairs["reward"] > pairs["reward_worse"]).sum()
    assert accuracy["value"] == pytest.approx(correct / pairs.height)
    query = "select count(*) as n from rewards where experiment = 'toy_rm' and iteration = 2"
    assert json.loads(both.textalign("sql", query, "--json").stdout) == [{"n": 36}]

    both.textalign("run", "toy_rewarded")
    trained = both.artifact("toy_rm", 2, "checkpoint")
    feedback = both.artifact("toy_rewarded", 1, "feedback")
    assert feedback.manifest["inputs"]["reward_model toy_rm@2"] == trained.key
    rows = feedback.frame("feedback")
    assert set(rows["status"]) == {"ok"} and set(rows["scorer"]) == {"reward_model"}
    assert rows["value"].n_unique() > 6
    shown = both.textalign("show", "toy_rewarded", "--json").stdout
    assert "score" in {row["metric"] for row in json.loads(shown)}

    # The same model ranks the base policy's samples.
    evaluation = both.artifact("toy_rewarded", 0, "evaluation")
    assert evaluation.manifest["inputs"]["reward_model toy_rm@2"] == trained.key
    candidates = evaluation.frame("candidates")
    lists = candidates.group_by("prompt_id").agg("score")["score"].to_list()
    assert candidates.height == 72 and {len(scores) for scores in lists} == {6}
    subsets = [mean(max(three) for three in combinations(scores, 3)) for scores in lists]
    best = evaluation.frame("scores").filter(subject="best of 3")
    by_metric = dict(best.select("metric", "value").iter_rows())
    assert by_metric["ranked_score"] == pytest.approx(mean(subsets))
    assert by_metric["kl_bound"] == pytest.approx(math.log(3) - 2 / 3) and 0 < by_metric["kl"] < math.log(3)
    # The best ones are measured like the samples of any policy: here by the ranker itself.
    assert (
        by_metric["score"]
        > evaluation.frame("scores").filter(subject="best of 1", metric="score")["value"][0]
    )
    assert set(evaluation.frame("evaluation_samples")["role"]) == {"main", "baseline"}

    # The samples of the evaluation, exported for AlpacaEval.
    outputs = both.folder / "outputs.json"
    for k in (0, 1):
        both.textalign(
            "export", "toy_rewarded", str(outputs), "--iteration", str(k), "--format", "alpaca_eval"
        )
    written = json.loads(outputs.read_text(encoding="utf-8"))
    expected = both.frame("toy_rewarded", 1, "evaluation", "evaluation_samples").filter(role="main")
    assert [(row["instruction"], row["output"]) for row in written] == expected.select(
        "prompt", "text"
    ).rows()
    assert written[0]["dataset"] == "pep8" and written[0]["generator"] == "toy_rewarded@1"

    # With another reward model under that name, its feedback is stale.
    other = both.artifact("toy_rm", 1, "checkpoint")
    both.store.assign("toy_rm", 2, "checkpoint", other, settings=trained.manifest["settings"], checks={})
    cells = json.loads(both.textalign("status", "toy_rewarded", "--json").stdout)
    assert {cell["state"] for cell in cells if cell["stage"] == "feedback"} == {"stale"}
