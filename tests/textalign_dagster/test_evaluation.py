"""Which prompts and conditions an evaluation has, and its score table by hand."""

from __future__ import annotations

import math
from pathlib import Path

import polars as pl
import pytest

from textalign_dagster.evaluation import (
    GUARDS,
    Asked,
    conditions,
    evaluation_prompts,
    evaluation_source,
    score_table,
    titles,
    value_of,
)
from textalign_dagster.experiment import Experiment
from textalign_dagster.settings import SettingsError, merge, validate
from textalign_dagster.tables import SCORES
from textalign_dagster.tasks import Measure


def experiment(**changes: object) -> Experiment:
    least = {
        "task": "pep8",
        "method": {"name": "alt_lmu", "ask_for": "good", "probe": ["bad", "odd"]},
        "policy": {"model": "m"},
    }
    found: Experiment = validate(Experiment, merge(least, changes), "x")
    return found


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
    found = evaluation_prompts(experiment(**files))
    assert found["prompt"].to_list() == ["x", "y"]
    assert found.columns == ["prompt_id", "prompt", "seeds"]
    seeds = found["seeds"].explode()
    assert len(seeds) == seeds.n_unique() == 6
    assert found.equals(evaluation_prompts(experiment(**files)))
    assert not seeds.equals(evaluation_prompts(experiment(**files, seed=1))["seeds"].explode())
    assert evaluation_source(found) == evaluation_source(evaluation_prompts(experiment(**files, seed=1)))


def test_a_prompt_in_both_files_is_contamination(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        evaluation_prompts(experiment(**prompt_files(tmp_path, ["a", "y"], ["x", "y"])))
    assert str(caught.value) == (
        f"evaluation.path: 1 prompts of {tmp_path / 'held_out.csv'} are trained on too, e.g. 'y'; "
        "remove them from one of the files"
    )


def test_a_file_of_the_tasks_own_evaluation_prompts_cannot_be_trained_on(tmp_path: Path) -> None:
    own = experiment().task.prompts("evaluation")["prompt"].to_list()
    pl.DataFrame({"prompt": own[:1]}).write_csv(tmp_path / "train.csv")
    with pytest.raises(SettingsError, match="the held-out prompts of task pep8 are trained on too"):
        evaluation_prompts(experiment(prompts={"path": str(tmp_path / "train.csv")}))


def test_too_few_prompts(tmp_path: Path) -> None:
    with pytest.raises(
        SettingsError, match=r"evaluation\.prompts: 2 wanted, but there are 1 in .*held_out\.csv"
    ):
        evaluation_prompts(experiment(**prompt_files(tmp_path, ["a"], ["x"])))


MEASURES = (
    Measure("violations", "violations per 1,000", "violations", "characters", 1000, "lower"),
    Measure("clean", "clean samples", "clean", better="higher"),
)


def samples() -> tuple[pl.DataFrame, pl.DataFrame]:
    frame = pl.DataFrame(
        {
            "sample_id": ["a", "b", "c", "d", "e"],
            "prompt_id": ["p", "p", "q", "q", "p"],
            "condition": ["good"] * 4 + ["bad"],
            "role": ["main"] * 4 + ["probe"],
            "text": ["x y z", "x y z", "x y z", "u v w", "one"],
            "n_tokens": [2, 4, 3, 3, 9],
            "nll": [2.0, 1.0, 3.0, None, None],
            "nll_tokens": [2, 1, 3, None, None],
        }
    )
    measured = pl.DataFrame(
        {
            "sample_id": ["a", "b", "c", "d", "e"],
            "violations": [1.0, 0.0, 2.0, 1.0, 7.0],
            "characters": [100.0, 100.0, 100.0, 100.0, 70.0],
            "clean": [0.0, 1.0, 0.0, None, 0.0],
        }
    )
    return frame, measured


def test_the_score_table_by_hand() -> None:
    frame, measured = samples()
    scores = score_table(frame, measured, MEASURES, policy_hash="h", resamples=100)
    assert scores.schema == SCORES
    assert set(scores["policy_hash"]) == {"h"}
    assert value_of(scores, "violations") == pytest.approx(1000 * 4 / 400)
    assert value_of(scores, "clean") == pytest.approx(1 / 3)  # not measured is not 0
    assert value_of(scores, "n_tokens") == pytest.approx(3.0)
    assert value_of(scores, "perplexity") == pytest.approx(math.exp((2 + 1 + 3) / (2 + 1 + 3)))
    assert value_of(scores, "violations", role="probe") == pytest.approx(100.0)
    assert value_of(scores, "perplexity", role="probe") is None  # probes are not scored: no row, not 0
    assert value_of(scores, "nonsense") is None
    main = {row["metric"]: row for row in scores.filter(role="main").iter_rows(named=True)}
    # Four samples are no block of distinct-3: where a number is undefined there is no row.
    assert list(main) == ["violations", "clean", *(m.name for m in GUARDS if m.name != "distinct_3")]
    for name in ("violations", "clean", "n_tokens", "perplexity"):
        row = main[name]
        assert row["n"] == 2  # prompts, the unit that is resampled
        assert row["lo"] <= row["value"] <= row["hi"]
        assert row["condition"] == "good"
    # Two prompts with means 5 and 15: no resampling can leave that range.
    assert 5 <= main["violations"]["lo"] <= main["violations"]["hi"] <= 15


def test_distinct_3_of_blocks_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("textalign_dagster.evaluation.DISTINCT_BLOCK", 2)
    frame, measured = samples()
    scores = score_table(frame, measured, MEASURES, policy_hash="h", resamples=100)
    # Blocks of two samples of a prompt: (x y z, x y z) has 1 trigram in 6 words, (x y z, u v w) has 2.
    assert value_of(scores, "distinct_3") == pytest.approx((1 / 6 + 2 / 6) / 2)


def test_row_order_does_not_matter() -> None:
    frame, measured = samples()
    one = score_table(frame, measured, MEASURES, policy_hash="h", resamples=100)
    two = score_table(frame, measured.reverse(), MEASURES, policy_hash="h", resamples=100)
    assert one.equals(two)


def test_titles_are_in_the_order_of_reporting() -> None:
    assert list(titles(MEASURES)) == ["violations", "clean", "distinct_3", "perplexity", "n_tokens"]
