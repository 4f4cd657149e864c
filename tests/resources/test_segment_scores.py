"""How bad the segments of a corpus are, according to the task, a scorer, or the file itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from resources.feedback_sources import feedback_of
from resources.store import ArtifactStore
from tests.textalign_dagster.experiment.test_corpus import experiment
from textalign_dagster.experiment import Experiment, corpus
from textalign_dagster.prompts import prompt_id

UNLIKELIHOOD = {"name": "unlikelihood"}


def judged(settings: Experiment, tmp_path: Path) -> Any:
    assert settings.offline is not None
    names = corpus.shards(settings.offline)["prompt"].to_list()
    draws = pl.DataFrame({"draw_id": names, "prompt_id": [prompt_id(name) for name in names]})
    samples = corpus.documents(settings.offline, draws).with_columns(
        reference=pl.lit(None, dtype=pl.String), finish_reason=pl.lit("stop")
    )
    store = ArtifactStore(tmp_path / "store")
    feedback = feedback_of(
        settings, samples, iteration=1, store=store, report=lambda *_, **__: None, purpose=""
    )
    return feedback, samples


def test_marks_of_the_task_are_scored_per_character(tmp_path: Path) -> None:
    """`a=1` and `d=4` lack spaces around the operator: one mark each, in lines of 4 and 3 characters."""
    settings = experiment(
        tmp_path, method=UNLIKELIHOOD, training={"block": 8, "objective": {"name": "unlikelihood"}}
    )
    feedback, samples = judged(settings, tmp_path)
    texts = dict(samples.select("sample_id", "text").iter_rows())
    values = {texts[i]: value for i, value in feedback.rows.select("sample_id", "value").iter_rows()}
    assert values == {"a=1\nb = 2\n": -0.125, "c = 3\n": 0.0, "d=4": pytest.approx(-1 / 3), "e = 5\n": 0.0}
    assert (
        set(feedback.rows["status"]) == {"ok"}
        and feedback.rows["sample_id"].to_list() == samples["sample_id"].to_list()
    )
    first = feedback.spans.filter(sample_id=samples["sample_id"][0])
    assert first.select("start", "end", "score", "label").rows() == [
        (0, 4, 0.25, "line"),
        (4, 10, 0.0, "line"),
    ]


def test_a_configured_scorer_scores_the_segments(tmp_path: Path) -> None:
    scorer = {"name": "patterns", "patterns": ["="]}
    settings = experiment(
        tmp_path,
        method=UNLIKELIHOOD,
        scorer=scorer,
        training={"block": 8, "objective": {"name": "unlikelihood"}},
    )
    feedback, _ = judged(settings, tmp_path)
    assert set(feedback.rows["scorer"]) == {"patterns"} and feedback.spans["score"].max() > 0


def test_scores_from_the_file(tmp_path: Path) -> None:
    settings = experiment(tmp_path, method={"name": "filtering"})
    assert settings.offline is not None
    path = Path(settings.offline.path)
    path.write_text('{"texts": ["x\\n", "y\\n"], "scores": [0.5, 0.0]}\n', encoding="utf-8")
    feedback, _ = judged(settings, tmp_path)
    assert feedback.rows.select("value", "kind", "scorer").rows() == [(-0.25, "reward", "corpus")]
    assert feedback.spans["score"].to_list() == [0.5, 0.0]
