"""`textalign clean` after real runs: what is removed, and that everything else can still be queried."""

from __future__ import annotations

import json
import shutil
from datetime import timedelta
from pathlib import Path
from urllib.request import Request, urlopen

import dagster as dg
import polars as pl
import pytest

from resources.engines.chunks import CHUNK
from resources.store import ArtifactStore, Draft
from resources.store.removal import ATTEMPTS, CHUNKS, UNREFERENCED, removable, remove
from tests.integration.conftest import Place, Ran
from textalign_dagster.cli.running import dagster_instance

ALL = ("clean", "--older-than", "0", "--unreferenced")


@pytest.fixture
def copied(ran: Ran, tmp_path: Path) -> Place:
    return ran.copy(tmp_path / "copied")


def rows(place: Place) -> list[list[str]]:
    """Query results for the first iteration and the null control."""
    query = (
        "select experiment, iteration, count(*) as samples, sum(logprob) as logprob from generations "
        "where experiment <> 'toy' or iteration < 2 group by all order by all"
    )
    samples = place.textalign("sql", query, "--json").stdout
    scores = json.loads(place.textalign("show", "toy", "--json").stdout)
    kept = [row for row in scores if row["experiment"] != "toy" or row["iteration"] < 2]
    return [json.loads(samples), kept]


def test_finished_run_is_kept(copied: Place) -> None:
    assert "nothing to remove" in copied.textalign(*ALL, "--apply").stdout


def test_artifacts_without_cells_are_removed_and_the_rest_can_be_queried(copied: Place) -> None:
    lost = {stage: copied.artifact("toy", 2, stage) for stage in ("generations", "checkpoint", "evaluation")}
    first = copied.artifact("toy", 1, "checkpoint")
    before = rows(copied)
    shutil.rmtree(copied.home / "store" / "cells" / "toy" / "002")
    listed = copied.textalign(*ALL).stdout
    assert lost["checkpoint"].key in listed and first.key not in listed
    assert "nothing was removed: use --apply to remove them" in listed
    assert copied.store.find("checkpoint", lost["checkpoint"].key) is not None
    removed = json.loads(copied.textalign(*ALL, "--json", "--apply").stdout)
    assert {item["artifact"][0] for item in removed} >= {"generations", "checkpoint", "evaluation"}
    for stage, artifact in lost.items():
        assert copied.store.find(stage, artifact.key) is None
    assert rows(copied) == before
    for experiment, iteration in (("toy", 1), ("toy_null", 1), ("toy_null", 2)):
        copied.artifact(experiment, iteration, "checkpoint").verify()
    states = json.loads(copied.textalign("status", "toy_null", "--json").stdout)
    assert {cell["state"] for cell in states} == {"fresh"}


def test_nothing_is_removed_during_a_run(copied: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEXTALIGN_HOME", str(copied.home))
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    shutil.rmtree(copied.home / "store" / "cells" / "toy")
    with dagster_instance() as instance:
        tags = {"dagster/partition/experiment": "toy"}
        run = instance.add_run(dg.DagsterRun("a_job", status=dg.DagsterRunStatus.STARTED, tags=tags))
        refused = copied.textalign(*ALL, "--apply", ok=False).stderr
        assert f"run {run.run_id[:8]} of toy is under way; nothing was removed" in refused
        instance.report_run_canceled(run)
    listed = copied.textalign(*ALL).stdout
    assert "toy has cells" not in listed and "artifacts without a cell" in listed
    assert "removed: " in copied.textalign(*ALL, "--apply").stdout


def test_cells_without_an_experiment_file_are_reported(copied: Place) -> None:
    (copied.experiments / "toy_null.yaml").unlink()
    (copied.experiments / "toy.yaml").write_text("extends: pep8_alt_lmu\n")
    output = copied.textalign(*ALL).stdout
    assert "toy_null still has cells but no experiment file; its artifacts are kept. Remove " in output
    assert "nothing to remove" in output


def test_on_s3(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("obstore", reason="object stores need the extra s3")
    for name, value in {
        "AWS_ENDPOINT_URL": s3_endpoint, "AWS_ACCESS_KEY_ID": "a-test", "AWS_SECRET_ACCESS_KEY": "a-test",
        "AWS_REGION": "us-east-1", "TEXTALIGN_CACHE": str(tmp_path / "cache"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    urlopen(Request(f"{s3_endpoint}/clean", method="PUT")).close()
    store = ArtifactStore("s3://clean/a/store")
    schema = pl.Schema({"n": pl.Int64()})

    def fill(draft: Draft) -> None:
        draft.write("rows", pl.DataFrame({"n": [1]}, schema), schema)

    artifacts = {
        (stage, key): store.make(stage, key, fill, inputs={}, settings={})
        for stage, key in ((CHUNK, "chunk"), ("generations", "kept"), ("generations", "gone"))
    }
    kept = artifacts["generations", "kept"]
    store.assign("one", 1, "generations", kept, settings={}, checks={})
    # An upload that may still be in progress elsewhere, and an attempt on this machine that is not.
    store.storage.create("artifacts/generations/kept/20260101T000000-00000000/half", b"x")
    dead = store.local / "artifacts" / "generations" / "new" / "20260101T000000-00000000"
    dead.mkdir(parents=True)

    def listed(hours: float) -> dict[str, list[str]]:
        kinds: dict[str, list[str]] = {}
        for item in removable(store, tmp_path, older_than=timedelta(hours=hours), unreferenced=True):
            kinds.setdefault(item.kind, []).append(item.place)
        return kinds

    assert listed(24) == {ATTEMPTS: [str(dead)]}
    assert listed(0) == {
        CHUNKS: [f"s3://clean/a/store/artifacts/{CHUNK}/chunk"],
        ATTEMPTS: [str(dead)],
        UNREFERENCED: ["s3://clean/a/store/artifacts/generations/gone"],
    }
    remove(store, removable(store, tmp_path, older_than=timedelta(0), unreferenced=True), timedelta(0))
    assert listed(0) == {} and not dead.exists()
    assert store.find("generations", "gone") is None and store.find(CHUNK, "chunk") is None
    shutil.rmtree(tmp_path / "cache")
    assert kept.frame("rows")["n"].to_list() == [1]
