"""The store on S3: a moto server in its own process, accessed over HTTP."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import polars as pl
import pytest

from resources.store import ArtifactError, ArtifactStore, Draft
from resources.views import connect, write_catalog
from textalign_dagster import PROJECT

pytest.importorskip("obstore", reason="object stores need the extra s3")
pytest.importorskip("moto.server", reason="needs moto[server]")

ROOT = PROJECT
NUMBERS = pl.Schema({"n": pl.Int64()})
FRAME = pl.DataFrame({"n": [3, 1, 2]}, schema=NUMBERS)
BIG = 11 * 2**20  # bytes; enough for a multipart upload


@pytest.fixture
def url(
    s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest, tmp_path: Path
) -> str:
    bucket = re.sub("[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[:60]
    urlopen(Request(f"{s3_endpoint}/{bucket}", method="PUT")).close()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "access-of-a-test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-a-test")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("TEXTALIGN_CACHE", str(tmp_path / "cache"))
    return f"s3://{bucket}/a/prefix"


def fill(draft: Draft) -> None:
    draft.write("generations", FRAME, NUMBERS)
    model = draft.folder("model")
    (model / "deep").mkdir()
    (model / "deep" / "weights").write_bytes(os.urandom(1024) * (BIG // 1024))
    (model / "empty").touch()


def make(store: ArtifactStore, produce: Any = fill, key: str = "k1") -> Any:
    return store.make("generations", key, produce, inputs={}, settings={})


def test_round_trip(url: str, tmp_path: Path) -> None:
    store = ArtifactStore(url)
    assert store.find("generations", "k1") is None
    artifact = make(store)
    assert not artifact.reused and artifact.url("generations").startswith(f"{url}/artifacts/generations/k1/")
    assert make(store, lambda draft: pytest.fail("computed twice")).reused
    elsewhere = ArtifactStore(url, cache=tmp_path / "another machine").find("generations", "k1")
    assert elsewhere is not None and elsewhere == artifact
    assert elsewhere.frame("generations").equals(FRAME)
    weights = elsewhere.path("model") / "deep" / "weights"
    assert weights.read_bytes() == (artifact.path("model") / "deep" / "weights").read_bytes()
    assert (elsewhere.path("model") / "empty").exists()
    elsewhere.verify()
    assert "secret-of-a-test" not in repr(artifact.manifest)
    store.remove("generations", "k1")
    assert store.find("generations", "k1") is None and store.storage.entries("artifacts") == {}


def test_cells_and_views(url: str) -> None:
    store = ArtifactStore(url)
    frame = pl.DataFrame({"sample_id": ["s1", "s2"], "text": ["x", "y"]})
    artifact = make(store, lambda draft: draft.write("generations", frame, frame.schema))
    for cell in [("a", 1), ("b", 12)]:
        store.assign(*cell, "generations", artifact, settings={}, checks={})
    pointer = store.pointer("b", 12, "generations")
    assert pointer is not None and pointer.artifact == artifact
    with connect(store) as connection:
        rows = connection.execute(
            "SELECT experiment, iteration, sample_id FROM samples ORDER BY ALL"
        ).fetchall()
    assert rows == [("a", 1, "s1"), ("a", 1, "s2"), ("b", 12, "s1"), ("b", 12, "s2")]
    with pytest.raises(ArtifactError, match="a catalog file requires a local store"):
        write_catalog(store)


def test_create_if_absent(url: str) -> None:
    first, second = ArtifactStore(url).storage, ArtifactStore(url).storage
    assert first.create("claim", b"1")
    assert not second.create("claim", b"2")
    assert second.read("claim") == b"1"


def test_a_service_without_conditional_writes_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ArtifactStore(url)
    storage: Any = store.storage
    put = storage.store.put

    class Careless:
        """Ignores If-None-Match, as some S3 gateways do."""

        def __getattr__(self, name: str) -> Any:
            return getattr(real, name)

        def put(self, *arguments: Any, mode: str = "overwrite", **options: Any) -> Any:
            return put(*arguments, **options)

    real, storage.store = storage.store, Careless()
    with pytest.raises(ArtifactError, match="ignores If-None-Match"):
        make(store, lambda draft: pytest.fail("ran"))
    assert storage.entries("") == {}


RACER = """
import os, signal, sys
import polars as pl
from resources.store import ArtifactStore
from resources.store.object_storage import ObjectStorage
url, name = sys.argv[1:]
if name == "killed":
    upload = ObjectStorage.upload
    def first_only(self, path, source):
        upload(self, path, source)
        os.kill(os.getpid(), signal.SIGKILL)
    ObjectStorage.upload = first_only
schema = pl.Schema({"n": pl.Int64()})
def produce(draft):
    draft.write("generations", pl.DataFrame({"n": [3, 1, 2]}), schema)
    (draft.folder("model") / "name").write_text(name)
    print("filled", flush=True)
    sys.stdin.readline()
made = ArtifactStore(url).make("generations", "k1", produce, inputs={}, settings={})
print(made.attempt, made.reused, (made.path("model") / "name").read_text(), flush=True)
"""


def start(url: str, name: str) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", RACER, url, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert child.stdout is not None and child.stdout.readline() == "filled\n"
    return child


def test_two_processes_one_winner(url: str) -> None:
    racers = [start(url, name) for name in "ab"]
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    outputs = [racer.communicate()[0].split() for racer in racers]
    assert outputs[0][0] == outputs[1][0] and outputs[0][2] == outputs[1][2]
    assert sorted(reused for _, reused, _ in outputs) == ["False", "True"]
    store = ArtifactStore(url)
    assert len(store.storage.entries("artifacts/generations/k1")) == 3, "the loser's files are gone"
    assert store.clean() == []


def test_killed_while_uploading(url: str) -> None:
    child = start(url, "killed")
    child.communicate("\n")
    assert child.returncode == -9
    store = ArtifactStore(url)
    assert len(store.storage.entries("artifacts")) == 1, "one file exists, but"
    assert store.find("generations", "k1") is None
    artifact = make(store)
    assert not artifact.reused and artifact.frame("generations").equals(FRAME)
    assert not list(store.local.glob("artifacts/*/*/.*.lock")), "local leftovers were removed at once"
    assert store.clean() == [], "a recent upload may still be in progress"
    assert len(store.clean(older_than=timedelta(0))) == 1
    artifact.verify()
    assert len(store.storage.entries("artifacts")) == 4


def test_damaged_files_are_detected(url: str, tmp_path: Path) -> None:
    store = ArtifactStore(url)
    artifact = make(store)
    name = f"{artifact.prefix}/generations.parquet"
    size = artifact.tables["generations"]["bytes"]
    store.storage.replace(name, b"x" * size)
    fresh = ArtifactStore(url, cache=tmp_path / "fresh").find("generations", "k1")
    assert fresh is not None
    with pytest.raises(ArtifactError, match="its hash differs"):
        fresh.frame("generations")
    store.storage.replace(name, b"x")
    with pytest.raises(ArtifactError, match=f"has 1 bytes instead of {size}.*Remove {url}/artifacts"):
        store.find("generations", "k1")
    store.storage.remove(name)
    with pytest.raises(ArtifactError, match=r"generations\.parquet is missing"):
        make(store)


def test_no_such_bucket(url: str) -> None:
    store = ArtifactStore("s3://no-such-bucket/x")
    with pytest.raises(ArtifactError, match=r"s3://no-such-bucket/x/.*404.*check the bucket") as error:
        make(store)
    assert "\n" not in str(error.value) and "<?xml" not in str(error.value)


def test_credentials_of_a_profile(url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("boto3", reason="profiles are read by boto3")
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = a\naws_secret_access_key = b\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert make(ArtifactStore(url)).frame("generations").equals(FRAME)
