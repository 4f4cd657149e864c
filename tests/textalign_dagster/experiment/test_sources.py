"""Where prompts come from, and which of their properties affect artifacts."""

from __future__ import annotations

import os
from pathlib import Path

import polars as pl

from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.sources import held_out_prompts, source_hash, training_prompts
from textalign_dagster.settings import validate


def experiment(**changes: object) -> Experiment:
    content = {"task": "pep8", "method": "quark", "policy": {"model": "pep8-sloppy-1m"}, **changes}
    result: Experiment = validate(Experiment, content, "x")
    return result


def test_a_file_is_read_instead_of_the_task(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt\na\nb\n")
    assert training_prompts(experiment(prompts={"path": str(path)}))["prompt"].to_list() == ["a", "b"]
    assert held_out_prompts(experiment(evaluation={"path": str(path)}))["prompt"].to_list() == ["a", "b"]
    own = training_prompts(experiment())
    assert own.height > 100
    assert not set(own["prompt"]) & set(held_out_prompts(experiment())["prompt"])


def test_an_edited_file_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "p.csv"
    path.write_text("prompt\na\n")
    mine = experiment(prompts={"path": str(path)})
    assert training_prompts(mine)["prompt"].to_list() == ["a"]
    path.write_text("prompt\nb\n")
    os.utime(path, ns=(1, 1))
    assert training_prompts(mine)["prompt"].to_list() == ["b"]


def test_source_hash_covers_texts_references_and_order() -> None:
    rows = pl.DataFrame(
        {"prompt": ["a", "b"], "reference": ["x", None], "source": "s", "source_revision": "r"}
    )
    same = rows.with_columns(other=1)
    changed = [
        rows.with_columns(prompt=pl.Series(["a", "c"])),
        rows.with_columns(reference=pl.Series([None, "x"], dtype=pl.String)),
        rows.reverse(),
        rows.head(1),
    ]
    assert source_hash(rows) == source_hash(same)
    assert len({source_hash(rows), *map(source_hash, changed)}) == 5
