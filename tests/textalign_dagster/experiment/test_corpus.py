"""Documents from a file in place of samples: shards, segments, and which settings they allow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from textalign_dagster.experiment import Experiment, corpus
from textalign_dagster.experiment.offline import offline_samples, summary
from textalign_dagster.experiment.sources import task_of, training_prompts
from textalign_dagster.loop.stages import stage_settings
from textalign_dagster.prompts import prompt_id
from textalign_dagster.settings import SettingsError, validate
from textalign_dagster.settings.offline import Offline

TEXTS = ["a=1\nb = 2\n", "", "c = 3\n", "d=4", "e = 5\n"]


def write_corpus(folder: Path, records: list[Any], name: str = "corpus.jsonl") -> Offline:
    path = folder / name
    if name.endswith(".parquet"):
        pl.DataFrame(records).write_parquet(path)
    else:
        path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return Offline(path=str(path), format="corpus", segments="line", shard=2)


def drawn(offline: Offline, *places: int) -> pl.DataFrame:
    names = corpus.shards(offline)["prompt"].to_list()
    rows = [(f"draw{i}", prompt_id(names[place])) for i, place in enumerate(places)]
    return pl.DataFrame(rows, ["draw_id", "prompt_id"], orient="row")


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.parquet"])
def test_shards_are_read_individually(tmp_path: Path, name: str) -> None:
    offline = write_corpus(
        tmp_path, [{"text": text, "meta": {"id": i}} for i, text in enumerate(TEXTS)], name
    )
    shards = corpus.shards(offline)
    assert shards["prompt"].to_list() == [f"{name}, documents {of}" for of in ("1 to 2", "3 to 4", "5 to 5")]
    samples = corpus.documents(offline, drawn(offline, 2, 0))
    assert samples.select("draw_id", "own_id", "text", "prompt").rows() == [
        ("draw0", "5", "e = 5\n", ""),
        ("draw1", "1", "a=1\nb = 2\n", ""),
    ]
    pieces = corpus.segments(offline, drawn(offline, 0, 1))
    assert pieces.drop("sample_id").rows() == [
        (0, 4, "a=1\n", None),
        (4, 10, "b = 2\n", None),
        (0, 6, "c = 3\n", None),
        (0, 3, "d=4", None),
    ]
    ids = corpus.documents(offline, drawn(offline, 0, 1))["sample_id"].to_list()
    assert pieces["sample_id"].unique(maintain_order=True).to_list() == ids


def test_prescored_corpus(tmp_path: Path) -> None:
    """The columns of the published datasets of Korbak et al."""
    records = [
        {"texts": ["One. ", "Two."], "scores": [0.25, 0.0], "avg_score": 0.125, "num_sents": 2, "meta": {}}
    ]
    offline = write_corpus(tmp_path, records)
    assert corpus.scored_elsewhere(offline)
    assert corpus.documents(offline, drawn(offline, 0))["text"].to_list() == ["One. Two."]
    pieces = corpus.segments(offline, drawn(offline, 0))
    assert pieces.drop("sample_id").rows() == [(0, 5, "One. ", 0.25), (5, 9, "Two.", 0.0)]
    bad = write_corpus(tmp_path, [{"texts": ["One."], "scores": [0.0, 1.0]}], "bad.jsonl")
    with pytest.raises(
        SettingsError, match=r"bad\.jsonl: document 1: texts, scores: must be two lists of the same"
    ):
        corpus.documents(bad, drawn(bad, 0))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"words": "a"}\n', "has the columns words; a corpus needs `text`"),
        ("", "cannot be read as Parquet or JSON Lines"),
        ("not json\n", "cannot be read as Parquet or JSON Lines"),
    ],
)
def test_invalid_corpus_files(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SettingsError, match=message):
        corpus.shards(Offline(path=str(path), format="corpus"))
    with pytest.raises(SettingsError, match="no such file"):
        corpus.shards(Offline(path=str(tmp_path / "none.jsonl"), format="corpus"))


def experiment(tmp_path: Path, **changes: Any) -> Experiment:
    offline = write_corpus(tmp_path, [{"text": text} for text in TEXTS])
    plain = {
        "task": {"name": "pep8"},
        "method": {"name": "mle"},
        "policy": {"model": "pep8-sloppy-1m"},
        "training": {"block": 8},
        **changes,
        "offline": {**offline.model_dump(), **changes.get("offline", {})},
    }
    return validate(Experiment, plain, "here.yaml")


def test_an_experiment_draws_shards(tmp_path: Path) -> None:
    mine = experiment(tmp_path)
    prompts = training_prompts(mine)
    assert prompts.height == 3 and set(prompts["source"]) == {"corpus.jsonl"}
    assert summary(mine, task_of(mine)) == "3 shards of up to 2 documents, each line to be scored"
    rows = prompts.head(1).select(
        "prompt", draw_id=pl.lit("d"), prompt_id=pl.lit(prompt_id(prompts["prompt"][0]))
    )
    assert offline_samples(mine, task_of(mine), rows)["text"].to_list() == ["a=1\nb = 2\n"]
    # The feedback of a corpus depends on how it is segmented.
    lines, whole = (
        experiment(tmp_path, method={"name": "filtering"}, offline={"segments": kind})
        for kind in ("line", "document")
    )
    assert stage_settings(lines, "feedback", 1) != stage_settings(whole, "feedback", 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {}}, "training.block: missing; a corpus is trained on in blocks"),
        (
            {
                "method": {"name": "dpo"},
                "training": {"block": 8, "objective": {"name": "dpo"}, "batch_size": 2},
            },
            "dpo reads sequences one by one",
        ),
        ({"method": {"name": "alt_lmc"}}, "needs feedback of kind 'category', which a corpus"),
        ({"offline": {"held_out": 1}}, "held_out: a corpus has none"),
    ],
)
def test_settings_that_do_not_work_with_a_corpus(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        experiment(tmp_path, **changes)


def test_settings_that_require_a_corpus() -> None:
    plain = {"task": {"name": "pep8"}, "method": {"name": "mle"}, "policy": {"model": "pep8-sloppy-1m"}}
    with pytest.raises(SettingsError, match=r"training\.block: only a corpus is trained on in blocks"):
        validate(Experiment, {**plain, "training": {"block": 8}}, "here.yaml")
    with pytest.raises(SettingsError, match=r"method\.tokens: segment: only a corpus has segments"):
        validate(Experiment, {**plain, "method": {"name": "conditional", "tokens": "segment"}}, "here.yaml")
