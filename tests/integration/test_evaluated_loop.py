"""Evaluation through the real assets: a scorer, a judge, baselines, a sweep over labels, another fluency model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.conftest import Place, Ran
from tests.integration.test_loop import stage_lines, states
from textalign_dagster.measures.diversity import ngram_entropy
from textalign_dagster.settings import write_yaml
from textalign_dagster.tables import EVALUATION_SAMPLES, SCORES

pytest.importorskip("openai", reason="needs the extra `judges`")

NAMES = ["add", "scale", "first", "total", "area", "twice"]
ANSWER = "\n    return 1\n"


@pytest.fixture(scope="module")
def measured(ran: Ran, judge_url: str, tmp_path_factory: pytest.TempPathFactory) -> Place:
    """The toy with every evaluation feature; it shares everything else with the toy."""
    place = ran.copy(tmp_path_factory.mktemp("measured") / "place")
    rows = [{"prompt": f"def {name}(a, b):", "reference": ANSWER} for name in NAMES[:-1]]
    held_out = place.experiments / "held_out.jsonl"
    lines = [json.dumps(row) for row in [*rows, {"prompt": f"def {NAMES[-1]}(a, b):"}]]
    held_out.write_text("\n".join(lines), encoding="utf-8")
    content = {
        "extends": "toy",
        "control": None,
        "iterations": 1,
        "method": {
            "probe": ["E111 indentation is not a multiple of 4", "E703 statement ends with a semicolon"]
        },
        "evaluation": {
            "path": str(held_out),
            "scorer": {"name": "patterns", "keywords": ["return"]},
            "judge": {
                "model": "toy",
                "base_url": judge_url,
                "api_key_env": None,
                "template": "win",
                "ask": "win",
            },
            "baselines": {"start": "pep8-sloppy-1m", "people": "references"},
            "fluency_model": "pep8-sloppy-1m",
            "text_statistics": True,
        },
    }
    (place.experiments / "measured.yaml").write_text(write_yaml(content), encoding="utf-8")
    done = place.textalign("run", "measured")
    (place.folder / "output.txt").write_text(done.stdout, encoding="utf-8")
    return place


def scores(place: Place, iteration: int, **which: str) -> dict[str, float]:
    """Metric → value of the selected rows."""
    rows = place.frame("measured", iteration, "evaluation", "scores").filter(**which)
    return dict(rows.select("metric", "value").iter_rows())


def test_tables_of_the_policy_and_baselines(measured: Place) -> None:
    for k in (0, 1):
        assert measured.frame("measured", k, "evaluation", "scores").schema == SCORES
        assert measured.frame("measured", k, "evaluation", "evaluation_samples").schema == EVALUATION_SAMPLES
    start = measured.frame("measured", 0, "evaluation", "scores")
    assert set(start.select("subject", "role").unique().rows()) == {
        (None, "main"), ("start", "baseline"), ("people", "baseline")
    }  # fmt: skip
    now = measured.frame("measured", 1, "evaluation", "scores")
    assert now["subject"].null_count() == len(now)
    assert now.filter(role="probe")["condition"].n_unique() == 2  # every other label


def test_text_statistics_are_reported_with_the_other_metrics(measured: Place) -> None:
    texts = (
        measured.frame("measured", 1, "evaluation", "evaluation_samples")
        .filter(role="main")["text"]
        .to_list()
    )
    assert scores(measured, 1, role="main")["entropy_1"] == pytest.approx(ngram_entropy(texts, 1))
    for which in ({"role": "main"}, {"subject": "start"}, {"subject": "people"}):
        metrics = scores(measured, 0, **which)
        assert {"entropy_1", "entropy_2", "self_bleu_5"} <= metrics.keys(), which
    assert scores(measured, 0, subject="people")["self_bleu_5"] == pytest.approx(1.0)  # all identical


def test_references_as_a_baseline(measured: Place) -> None:
    people = scores(measured, 0, subject="people")
    assert people["score"] == 1.0  # each has one "return"
    assert people["violations"] == 0.0 and people["characters"] > 0
    assert people["perplexity"] > 1 and people["perplexity_mean"] > 1
    assert "win_rate" not in people  # a reference against itself
    n = measured.frame("measured", 0, "evaluation", "scores").filter(subject="people", metric="score")["n"]
    assert n.to_list() == [5]  # the sixth prompt has none


def test_base_policy_as_a_baseline_gets_the_same_scores(measured: Place) -> None:
    """Prompts, seeds, decoding, scorer and judge are the same; nothing else may affect the scores."""
    own, same = scores(measured, 0, role="main"), scores(measured, 0, subject="start")
    assert own == same and {"score", "win_rate", "judge_unusable", "perplexity"} <= set(own)


def test_judge_sees_both_orders_and_a_missing_reference_is_not_a_loss(measured: Place) -> None:
    judged = measured.frame("measured", 1, "evaluation", "judgements")
    assert judged["status"].value_counts().sort("status").rows() == [("ok", 5), ("skipped", 1)]
    assert set(judged.filter(status="ok")["value"]) <= {0.0, 0.5, 1.0}
    assert (judged.filter(status="ok")["call_keys"].list.len() == 2).all()
    now = scores(measured, 1, role="main")
    assert now["win_rate"] == pytest.approx(judged["value"].mean())
    assert now["judge_unusable"] == 0.0
    assert "win_rate" not in scores(measured, 1, role="probe")


def test_scores_match_the_scorer(measured: Place) -> None:
    samples = measured.frame("measured", 1, "evaluation", "evaluation_samples")
    for role in ("main", "probe"):
        texts = samples.filter(role=role)
        expected = texts["text"].str.count_matches(r"\breturn\b").mean()
        rows = measured.frame("measured", 1, "evaluation", "scores").filter(role=role, metric="score")
        assert rows["value"].mean() == pytest.approx(expected)


def test_sampling_stages_are_shared_and_a_rerun_computes_nothing(measured: Place) -> None:
    output = (measured.folder / "output.txt").read_text(encoding="utf-8")
    assert "datapool" in stage_lines(output)["measured|001"]  # it depends on the method's settings, too
    assert not {"prompt_draws", "generations", "feedback"} & set(stage_lines(output)["measured|001"])
    again = measured.textalign("run", "measured").stdout
    assert "measured|001  up to date" in again
    assert set(states(measured, "measured").values()) == {"fresh"}


def test_show_and_sql_output(measured: Place) -> None:
    shown = measured.textalign("show", "measured").stdout
    for label in ("baseline start", "baseline people", "conditioned on", "perplexity"):
        assert label in shown
    rows = json.loads(measured.textalign("show", "measured", "--json").stdout)
    assert {row["subject"] for row in rows} == {None, "start", "people"}
    query = "select distinct subject from scores where experiment = 'measured' and role = 'baseline'"
    answer = json.loads(measured.textalign("sql", query, "--json").stdout)
    assert {row["subject"] for row in answer} == {"start", "people"}


def test_changing_the_scorer_changes_only_scores(measured: Place, tmp_path: Path) -> None:
    place = measured.copy(tmp_path / "place")
    path = place.experiments / "measured.yaml"
    path.write_text(path.read_text().replace("- return", "- def"), encoding="utf-8")
    assert states(place, "measured")[1, "evaluation"] == "stale"
    stages = stage_lines(place.textalign("run", "measured").stdout)
    assert stages == {"measured|001": ["evaluation"]}
    sampled = place.home / "store" / "artifacts" / "evaluation_sampling"
    before = measured.home / "store" / "artifacts" / "evaluation_sampling"
    assert {p.name for p in sampled.iterdir()} == {p.name for p in before.iterdir()}
    samples = [p.frame("measured", 1, "evaluation", "evaluation_samples") for p in (measured, place)]
    assert samples[0].drop("measures").equals(samples[1].drop("measures"))
    assert scores(place, 1, role="main")["win_rate"] == scores(measured, 1, role="main")["win_rate"]
    assert scores(place, 0, subject="people")["score"] == 0.0


def test_toy_without_extras_reports_basic_metrics(ran: Ran) -> None:
    """No scorer, no judge, no baseline: the basic metrics, and obedience."""
    expected = {
        "violations",
        "clean",
        "parse_rate",
        "characters",
        "distinct_3",
        "perplexity",
        "n_tokens",
        "obedience",
    }
    for k in (0, 1, 2):
        rows = ran.frame("toy", k, "evaluation", "scores")
        assert set(rows["metric"]) <= expected
        samples = ran.frame("toy", k, "evaluation", "evaluation_samples")
        names = set(samples["measures"].explode().struct.field("name"))
        assert "violations" in names and not names & {"score", "judge_value"}
        assert rows["subject"].null_count() == len(rows)
