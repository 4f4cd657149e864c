"""Varied exemplars: which texts can be drawn, and that the draw is reproducible."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest

from assets.exemplars import exemplars_of
from resources.store import ArtifactError
from textalign_dagster import PROJECT
from textalign_dagster.experiment.files import Library
from textalign_dagster.loop.stages import STAGES, stage_settings
from textalign_dagster.pool.draw import REASONS
from textalign_dagster.pool.exemplars import DROPPED, NoExemplarError, candidates, varied_exemplars

POOL = pl.DataFrame(
    [
        ("3", "Clear.", "quota"),
        ("3", "Clear.", "bucket full"),
        ("3", "Short and true.", "bucket full"),  # not trained on, but still a candidate
        ("3", "Complete.", "over-long"),
        ("3", "Of an iteration that has left the pool.", DROPPED),
        ("3", " ", "quota"),
        ("3", None, "quota"),
        ("2", "Nearly.", "quota"),
        (None, "No score.", "no label"),
    ],
    schema={"label": pl.String, "condition": pl.String, "reason": pl.String},
    orient="row",
)
PROMPTS = [f"prompt {i}" for i in range(300)]


def test_candidates_are_the_distinct_texts_of_the_best_bucket() -> None:
    assert sorted(candidates(POOL, "3")) == ["Clear.", "Complete.", "Short and true."]
    assert candidates(POOL, "2") == ["Nearly."]
    assert candidates(POOL, "0") == []
    assert DROPPED in REASONS


def test_candidate_order_does_not_depend_on_row_order() -> None:
    assert candidates(POOL, "3") == candidates(POOL.reverse(), "3") == candidates(POOL.sort("condition"), "3")


def test_a_prompts_exemplar_does_not_depend_on_the_other_prompts() -> None:
    drawn = dict(zip(PROMPTS, varied_exemplars(POOL, "3", PROMPTS, seed=0, iteration=2), strict=True))
    backwards = varied_exemplars(POOL.reverse(), "3", PROMPTS[::-1], seed=0, iteration=2)
    assert dict(zip(PROMPTS[::-1], backwards, strict=True)) == drawn
    assert (
        varied_exemplars(POOL, "3", ["prompt 7", "prompt 7"], seed=0, iteration=2) == [drawn["prompt 7"]] * 2
    )


def test_all_candidates_are_drawn_about_equally_often() -> None:
    counts = Counter(varied_exemplars(POOL, "3", PROMPTS, seed=0, iteration=2))
    assert set(counts) == {"Clear.", "Complete.", "Short and true."}
    assert all(70 <= count <= 130 for count in counts.values()), counts


def test_the_draw_depends_on_seed_and_iteration() -> None:
    one = varied_exemplars(POOL, "3", PROMPTS, seed=0, iteration=2)
    assert varied_exemplars(POOL, "3", PROMPTS, seed=0, iteration=2) == one
    assert varied_exemplars(POOL, "3", PROMPTS, seed=1, iteration=2) != one
    assert varied_exemplars(POOL, "3", PROMPTS, seed=0, iteration=3) != one


def test_the_draw_is_pinned() -> None:
    """The draw determines sample ids: a change here requires a new version of the stages."""
    assert candidates(POOL, "3") == ["Clear.", "Complete.", "Short and true."]
    drawn = varied_exemplars(POOL, "3", ["p1", "p2", "p3", "p4"], seed=0, iteration=2)
    assert drawn == ["Short and true.", "Short and true.", "Complete.", "Clear."]


def test_an_empty_best_bucket_is_reported_with_a_remedy() -> None:
    with pytest.raises(NoExemplarError, match=r"best bucket \('0'\).*sample more.*exemplar: static"):
        varied_exemplars(POOL, "0", PROMPTS, seed=0, iteration=2)


def stage(*overrides: str) -> Any:
    """A stage of iteration 2 whose datapools are `POOL`."""
    experiment = Library((PROJECT / "experiments",)).overridden("pep8_alt_lmu", list(overrides))
    return SimpleNamespace(
        name="generations",
        experiment=experiment,
        cell=SimpleNamespace(experiment="mine", iteration=2),
        require=lambda name, iteration: SimpleNamespace(key=f"{name} {iteration}", frame=lambda table: POOL),
    )


def test_exemplars_of_a_stage_and_their_inputs() -> None:
    assert exemplars_of(stage("seed=0"), ["p1", "p2"], pool=1) == (["no issues"] * 2, {})
    assert exemplars_of(stage("method.exemplar=none"), ["p1", "p2"], pool=1) == ([None] * 2, {})
    exemplars, inputs = exemplars_of(stage("method.exemplar=varied"), ["p1", "p3"], pool=1)
    assert (exemplars, inputs) == (["Short and true.", "Complete."], {"datapool@1": "datapool 1"})
    with pytest.raises(
        ArtifactError, match=r"^generations of mine, iteration 2: no sample .* best bucket \('7'\)"
    ):
        none_good = stage("method.exemplar=varied", "method.scores=[7, 2, 1, 0]", "datapool.shares=null")
        exemplars_of(none_good, ["p1"], pool=1)


@pytest.mark.parametrize("policy", ["none", "varied"])
def test_another_exemplar_policy_makes_samples_and_evaluation_stale(policy: str) -> None:
    library = Library((PROJECT / "experiments",))
    before = library.load("pep8_alt_lmu")
    after = library.overridden("pep8_alt_lmu", [f"method.exemplar={policy}"])

    def differ(iteration: int) -> list[str]:
        return [
            s for s in STAGES if stage_settings(before, s, iteration) != stage_settings(after, s, iteration)
        ]

    assert differ(0) == ["datapool"]  # which iteration 0 does not have: its samples and evaluation are shared
    assert differ(1) == ["datapool", "evaluation"]
    assert differ(2) == ["generations", "datapool", "evaluation"]
