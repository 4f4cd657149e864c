"""The store: published artifacts are complete, unpublished ones invisible, whatever happens."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resources.store import (
    ArtifactError,
    ArtifactStore,
    Draft,
    attempts,
    durable,
    manifest,
    provenance,
    storage,
)
from textalign_dagster import PROJECT

ROOT = PROJECT
NUMBERS = pl.Schema({"n": pl.Int64(), "text": pl.String()})
FRAME = pl.DataFrame({"n": [3, 1, 2], "text": ["c", None, "b"]}, schema=NUMBERS)


def fill(draft: Draft) -> None:
    draft.write("numbers", FRAME, NUMBERS)
    model = draft.folder("model")
    (model / "deep").mkdir()
    (model / "deep" / "weights.bin").write_bytes(b"\0\1" * 500)
    (model / "empty.txt").touch()
    draft.record(usd=0.25)


def make(
    store: ArtifactStore, key: str = "k1", produce: Callable[[Draft], Any] = fill, **options: Any
) -> Any:
    options = {"inputs": {"policy": "p0"}, "settings": {"n": 3}, **options}
    return store.make("numbers", key, produce, **options)


def leftovers(root: Path) -> list[str]:
    """Files of the store that belong to no published artifact and no pointer."""
    store = ArtifactStore(root)
    known = {"cells"}
    for path in root.glob("artifacts/*/*/manifest.json"):
        artifact = store.find(path.parts[-3], path.parts[-2])
        assert artifact is not None
        known |= {f"{artifact.prefix}/{file['path']}" for file in artifact.manifest["files"]}
        known.add(path.relative_to(root).as_posix())
    files = (p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file())
    return [path for path in files if path not in known and not path.startswith("cells/")]


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path / "store")


def test_publishes_once_and_reuses(store: ArtifactStore) -> None:
    assert store.find("numbers", "k1") is None
    artifact = make(store, versions={"linter": "2"}, seed=7)
    assert not artifact.reused
    assert artifact.frame("numbers").equals(FRAME)
    assert (artifact.path("model") / "deep" / "weights.bin").stat().st_size == 1000
    assert artifact.url("numbers") == str(store.local / artifact.prefix / "numbers.parquet")
    again = make(store, produce=lambda draft: pytest.fail("made twice"))
    assert again.reused
    assert again == artifact
    artifact.verify()
    assert leftovers(store.local) == []


def test_manifest_records_everything(store: ArtifactStore) -> None:
    facts = make(store, versions={"linter": "2"}, seed=7).manifest
    assert facts["stage"] == "numbers" and facts["key"] == "k1"
    assert facts["inputs"] == {"policy": "p0"} and facts["settings"] == {"n": 3}
    assert facts["versions"] == {"linter": "2"} and facts["seed"] == 7
    assert facts["facts"] == {"usd": 0.25} and facts["seconds"] >= 0
    assert facts["environment_hash"] == provenance.environment_hash()
    assert facts["environment"]["polars"] == pl.__version__
    assert facts["code_revision"] and facts["host"] and facts["created_at"].endswith("+00:00")
    table = next(file for file in facts["files"] if file.get("table") == "numbers")
    assert table["rows"] == 3 and table["columns"] == {"n": "Int64", "text": "String"}
    assert {file["path"] for file in facts["files"]} == {
        "numbers.parquet",
        "model/deep/weights.bin",
        "model/empty.txt",
    }
    assert all(len(file["sha256"]) == 64 and file["bytes"] >= 0 for file in facts["files"])


def test_equal_frames_give_equal_bytes(store: ArtifactStore) -> None:
    rows = attempts.ROW_GROUP * 2 + 17
    frame = pl.DataFrame({"n": range(rows), "text": [f"row {n % 1000}" for n in range(rows)]})
    hashes = {
        make(store, key, lambda draft: draft.write("numbers", frame, NUMBERS)).tables["numbers"]["sha256"]
        for key in ("a", "b", "c")
    }
    assert len(hashes) == 1


@settings(max_examples=25)
@given(rows=st.lists(st.tuples(st.integers(-(2**63), 2**63 - 1), st.none() | st.text())))
def test_tables_round_trip(
    rows: list[tuple[int, str | None]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    frame = pl.DataFrame(rows, schema=NUMBERS, orient="row")
    store = ArtifactStore(tmp_path_factory.mktemp("store"))
    artifact = make(store, produce=lambda draft: draft.write("numbers", frame, NUMBERS))
    assert artifact.frame("numbers").equals(frame)


@pytest.mark.parametrize("failure", [ValueError("bad row"), KeyboardInterrupt(), SystemExit(3)])
def test_a_failure_publishes_nothing(store: ArtifactStore, failure: BaseException) -> None:
    def broken(draft: Draft) -> None:
        fill(draft)
        raise failure

    with pytest.raises(type(failure)):
        make(store, produce=broken)
    assert store.find("numbers", "k1") is None
    assert leftovers(store.local) == []
    assert not make(store).reused


def test_drafts_refuse_what_cannot_be_stored(store: ArtifactStore, tmp_path: Path) -> None:
    def twice(draft: Draft) -> None:
        draft.write("numbers", FRAME, NUMBERS)
        draft.write("numbers", FRAME, NUMBERS)

    def linked(draft: Draft) -> None:
        (draft.folder("model") / "weights").symlink_to(tmp_path)

    for produce, message in [
        (twice, "already written"),
        (linked, "symbolic link"),
        (lambda draft: draft.record(loss=float("nan")), r"facts\.loss"),
        (lambda draft: draft.record(path=Path()), r"facts\.path"),
        (lambda draft: draft.folder("../model"), "folder '../model'"),
    ]:
        with pytest.raises(ArtifactError, match=message):
            make(store, produce=produce)
    with pytest.raises(ValueError, match=r"numbers: missing columns \['text'\]"):
        make(store, produce=lambda draft: draft.write("numbers", FRAME.drop("text"), NUMBERS))
    assert leftovers(store.local) == []


@pytest.mark.parametrize(
    "secret",
    [
        {"judge": {"api_key": "sk-1234"}},
        {"judges": [{"OPENAI_API_KEY": "sk-1234"}]},
        {"endpoint": "https://user:pass@host/v1"},
        {"access_token": "hf_1234"},
    ],
)
def test_secrets_are_refused_before_anything_runs(store: ArtifactStore, secret: dict[str, Any]) -> None:
    with pytest.raises(ArtifactError, match="looks like a secret") as error:
        make(store, produce=lambda draft: pytest.fail("ran"), settings=secret)
    assert "1234" not in str(error.value) and "pass@" not in str(error.value)


def test_names_of_secrets_and_tokens_are_not_secrets(store: ArtifactStore) -> None:
    harmless = {
        "api_key_env": "OPENAI_API_KEY",
        "api_key": None,
        "max_tokens": 12,
        "special_tokens": ["<|x|>"],
        "eos_token": "</s>",
        "url": "http://localhost:8000/v1",
    }
    make(store, settings=harmless)


RACER = """
import sys
from pathlib import Path
import polars as pl
from resources.store import ArtifactStore
root, name = Path(sys.argv[1]), sys.argv[2]
schema = pl.Schema({"who": pl.String()})
def produce(draft):
    draft.write("numbers", pl.DataFrame({"who": [name]}), schema)
    print("filled", flush=True)
    sys.stdin.readline()
made = ArtifactStore(root).make("numbers", "k1", produce, inputs={}, settings={})
print(made.attempt, made.reused, made.frame("numbers")["who"][0], flush=True)
"""


def start(script: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


def test_two_processes_one_winner(store: ArtifactStore) -> None:
    racers = [start(RACER, str(store.local), name) for name in "ab"]
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline() == "filled\n"
    for racer in racers:  # both are filled: let both publish at once
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    outputs = [racer.communicate()[0].split() for racer in racers]
    assert outputs[0][0] == outputs[1][0], "both return the same artifact"
    assert sorted(reused for _, reused, _ in outputs) == ["False", "True"]
    assert outputs[0][2] == outputs[1][2]
    assert leftovers(store.local) == []


def test_live_attempts_are_left_alone(store: ArtifactStore) -> None:
    """A second writer sweeps, wins and cleans while the first is still filling its draft."""
    filling, proceed = threading.Event(), threading.Event()
    results: list[Any] = []

    def slow(draft: Draft) -> None:
        fill(draft)
        filling.set()
        assert proceed.wait(30)

    first = threading.Thread(target=lambda: results.append(make(store, produce=slow)))
    first.start()
    assert filling.wait(30)
    winner = make(ArtifactStore(store.local))
    assert store.clean() == []
    proceed.set()
    first.join()
    assert results[0] == winner and results[0].reused and not winner.reused
    assert leftovers(store.local) == []


# A child is killed by SIGKILL at its n-th file-system change, for every n. The parent forks before
# any of its own threads run, and checks only the files.
KILLED_EVERYWHERE = """
import os, signal, sys
from pathlib import Path
import polars as pl
from resources.store import ArtifactStore
schema = pl.Schema({"n": pl.Int64()})
CHANGES = {"open", "os.mkdir", "os.rename", "os.link", "os.remove", "os.rmdir", "shutil.rmtree"}

def work(root):
    def produce(draft):
        draft.write("numbers", pl.DataFrame({"n": [1, 2, 3]}), schema)
        (draft.folder("model") / "weights").write_bytes(b"w" * 10)
    store = ArtifactStore(root)
    made = store.make("numbers", "k1", produce, inputs={}, settings={})
    store.assign("exp", 1, "numbers", made, settings={}, checks={})

def in_child(root, kill_at):
    child = os.fork()
    if child == 0:
        seen = 0
        def hook(event, arguments):
            nonlocal seen
            if event in CHANGES and str(root) in str(arguments[0]):
                seen += 1
                if seen == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(hook)
        try:
            work(root)
        except BaseException:
            import traceback; traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

base = Path(sys.argv[1])
hashes, kills, at = set(), 0, 1
while True:
    root = base / str(at)
    code = in_child(root, at)
    assert code in (0, -signal.SIGKILL), code
    store = ArtifactStore(root)
    seen = store.find("numbers", "k1")  # raises if anything half-written is visible
    if seen is not None:
        seen.verify()
    assert store.pointer("exp", 1, "numbers") is None or seen is not None
    assert in_child(root, 0) == 0
    made = store.pointer("exp", 1, "numbers").artifact
    made.verify()
    hashes.add(tuple(file["sha256"] for file in made.manifest["files"]))
    known = {f["path"] for f in made.manifest["files"]}
    folder = root / "artifacts" / "numbers" / "k1"
    stray = [p for p in folder.iterdir()
             if p.name not in ("manifest.json", made.attempt) and p.suffix != ".tmp"]
    assert not stray, stray
    if code == 0:
        break
    kills, at = kills + 1, at + 1
assert len(hashes) == 1, hashes
print(kills)
"""


def test_a_process_killed_at_any_moment_leaves_a_consistent_store(tmp_path: Path) -> None:
    child = start(KILLED_EVERYWHERE, str(tmp_path))
    out, _ = child.communicate(timeout=120)
    assert child.returncode == 0
    assert int(out) >= 15, "the child was killed at too few moments"


def test_leftovers_of_a_killed_process_are_swept_by_the_next(store: ArtifactStore) -> None:
    child = start(RACER, str(store.local), "killed")
    assert child.stdout is not None and child.stdout.readline() == "filled\n"
    child.kill()
    child.communicate()
    assert store.find("numbers", "k1") is None
    assert leftovers(store.local), "the attempt exists, but is invisible"
    assert not make(store).reused
    assert leftovers(store.local) == []


def test_clean_removes_leftovers_only(store: ArtifactStore) -> None:
    artifact = make(store)
    store.assign("exp", 1, "numbers", artifact, settings={}, checks={})
    child = start(RACER, str(store.local), "killed")  # finds k1, so it produces nothing
    child.communicate("\n")
    dead = store.local / "artifacts" / "numbers" / "k2" / "20250101T000000-0123abcd"
    dead.mkdir(parents=True)
    (dead / "numbers.parquet").touch()
    stale = store.local / "cells" / "exp" / "001" / ".numbers.json.0123abcd.tmp"
    fresh = stale.with_name(".numbers.json.fresh.tmp")
    for path in (stale, fresh):
        path.touch()
    os.utime(stale, (time.time() - 7200,) * 2)
    assert sorted(store.clean()) == sorted([str(dead), str(stale)])
    assert fresh.exists() and store.find("numbers", "k1") == artifact
    assert store.cells().height == 1


def no_space(*_: Any, **__: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("module", "name"),
    [(attempts, "sync"), (storage, "write_durably"), (storage, "sync"), (os, "link"), (os, "mkdir")],
)
def test_disk_full_anywhere(
    store: ArtifactStore, monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    make(store, "before")
    with monkeypatch.context() as patched:
        patched.setattr(module, name, no_space)
        with pytest.raises(ArtifactError, match=r"no space left on .*; nothing was published$") as e:
            make(store)
    assert "\n" not in str(e.value)
    if (module, name) != (storage, "sync"):  # by then the manifest is linked: the artifact is complete
        assert store.find("numbers", "k1") is None
    assert leftovers(store.local) == []
    assert make(store).frame("numbers").equals(FRAME)


def test_disk_full_in_the_stage(store: ArtifactStore) -> None:
    with pytest.raises(ArtifactError, match="no space left"):
        make(store, produce=no_space)
    with pytest.raises(PermissionError):  # other errors are the stage's own
        make(store, produce=lambda draft: (_ for _ in ()).throw(PermissionError(13, "no")))
    polars_error = pl.exceptions.ComputeError("IO error: No space left on device (os error 28)")
    assert durable.full_disk(polars_error)
    assert not durable.full_disk(RuntimeError("No space left on device (os error 28)"))


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "tiny"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("not permitted to mount a tmpfs")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_disk_full_on_a_real_disk(tiny_disk: Path) -> None:
    store = ArtifactStore(tiny_disk)
    noise = pl.DataFrame({"n": [hash((n, "noise")) for n in range(60_000)]})

    def fill_table(draft: Draft) -> None:
        draft.write("numbers", noise, pl.Schema({"n": pl.Int64()}))

    def fill_folder(draft: Draft) -> None:
        (draft.folder("model") / "weights").write_bytes(bytes(2**20))

    for produce in (fill_table, fill_folder):
        with pytest.raises(ArtifactError, match=r"no space left on .*tiny \(.* MiB left\)"):
            make(store, produce=produce)
        assert leftovers(tiny_disk) == []
    assert make(store).frame("numbers").equals(FRAME)


def damage_missing(path: Path) -> None:
    path.unlink()


def damage_truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_missing, "numbers.parquet is missing"),
        (damage_truncate, r"numbers.parquet has \d+ bytes instead of \d+"),
    ],
)
def test_damaged_files_are_named(store: ArtifactStore, damage: Callable[[Path], None], message: str) -> None:
    artifact = make(store)
    store.assign("exp", 1, "numbers", artifact, settings={}, checks={})
    damage(Path(artifact.url("numbers")))
    remedy = rf"{message}.*Remove {store.local}/artifacts/numbers/k1 and run the stage again"
    for look in (
        lambda: store.find("numbers", "k1"),
        lambda: make(store),
        lambda: store.pointer("exp", 1, "numbers"),
    ):
        with pytest.raises(ArtifactError, match=remedy):
            look()
    store.remove("numbers", "k1")
    with pytest.raises(ArtifactError, match=r"not in the store: run stage 'numbers' of exp\|001 again"):
        store.pointer("exp", 1, "numbers")
    assert not make(store).reused


def test_changed_bytes_are_detected_by_verify(store: ArtifactStore) -> None:
    artifact = make(store)
    path = Path(artifact.url("numbers"))
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(ArtifactError, match=r"numbers\.parquet has changed since it was written"):
        artifact.verify()
    with pytest.raises(ArtifactError, match=r"numbers\.parquet cannot be read"):
        artifact.frame("numbers")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not readable JSON"),
        (b"{", "not readable JSON"),
        (b"\xff\xfe", "not readable JSON"),
        (b"[]", "not written by this project"),
        (b'{"format": 1}', r"not written by this project \(no stage, key"),
    ],
)
def test_unreadable_manifests_and_pointers_are_refused(
    store: ArtifactStore, content: bytes, message: str
) -> None:
    store.assign("exp", 1, "numbers", make(store), settings={}, checks={})
    manifest_path = store.local / "artifacts" / "numbers" / "k1" / "manifest.json"
    original = manifest_path.read_bytes()
    manifest_path.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"manifest.json .*{message}"):
        store.find("numbers", "k1")
    manifest_path.write_bytes(original)
    (store.local / "cells" / "exp" / "001" / "numbers.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"numbers.json .*remove it and run again"):
        store.pointer("exp", 1, "numbers")
    with pytest.raises(ArtifactError, match=r"numbers.json .*remove it and run again"):
        store.cells()


def test_a_newer_format_is_refused(store: ArtifactStore) -> None:
    artifact = make(store)
    newer = {**artifact.manifest, "format": manifest.FORMAT + 1}
    (store.local / "artifacts/numbers/k1/manifest.json").write_text(json.dumps(newer))
    with pytest.raises(ArtifactError, match="format 2, this version reads 1"):
        store.find("numbers", "k1")


def test_missing_parts_are_named(store: ArtifactStore) -> None:
    artifact = make(store)
    with pytest.raises(ArtifactError, match=r"no table 'scores'; it has \['numbers'\]"):
        artifact.frame("scores")
    with pytest.raises(ArtifactError, match=r"no folder 'weights'"):
        artifact.path("weights")


def test_cells_point_at_artifacts(store: ArtifactStore) -> None:
    assert store.cells().is_empty()
    assert store.pointer("exp", 1, "numbers") is None
    first, second = make(store), make(store, "k2")
    for experiment, iteration, artifact in [("exp", 1, first), ("exp", 0, second), ("other", 12, first)]:
        store.assign(experiment, iteration, "numbers", artifact, settings={"a": 1}, checks={"ok": True})
    pointer = store.pointer("exp", 1, "numbers")
    assert pointer is not None and pointer.artifact == first
    assert pointer.settings == {"a": 1} and pointer.checks == {"ok": True}
    assert pointer.inputs == {"policy": "p0"} and pointer.assigned_at.tzinfo is not None
    cells = store.cells()
    assert cells.select("experiment", "iteration", "key").rows() == [
        ("exp", 0, "k2"),
        ("exp", 1, "k1"),
        ("other", 12, "k1"),
    ]
    assert cells["passed"].all()
    store.assign("exp", 1, "numbers", second, settings={}, checks={"ok": True, "fresh": False})
    moved = store.pointer("exp", 1, "numbers")
    assert moved is not None and moved.artifact == second
    assert store.cells().filter(iteration=1)["passed"].to_list() == [False]


def test_a_rerun_does_not_mark_a_paid_cell_as_reused(store: ArtifactStore) -> None:
    store.assign("exp", 1, "numbers", make(store), settings={}, checks={})
    store.assign("exp", 1, "numbers", make(store), settings={}, checks={})  # reused, same cell
    store.assign("exp", 2, "numbers", make(store), settings={}, checks={})  # reused, another cell
    assert store.cells()["reused"].to_list() == [False, True]


def test_invalid_cells_are_refused(store: ArtifactStore) -> None:
    artifact = make(store)
    for experiment, iteration, stage, message in [
        ("../exp", 1, "numbers", "experiment '../exp'"),
        ("exp", -1, "numbers", "count from 0"),
        ("exp", 1, "scores", "is not an output of 'scores'"),
    ]:
        with pytest.raises(ArtifactError, match=message):
            store.assign(experiment, iteration, stage, artifact, settings={}, checks={})
    with pytest.raises(ArtifactError, match="key"):
        make(store, "../../k1")


def test_without_hard_links(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    assert store.storage.create("x/claim", b"1")
    assert not store.storage.create("x/claim", b"2")
    assert store.storage.read("x/claim") == b"1"
    assert make(store) == make(store)


def test_create_if_absent_has_one_winner_among_threads(store: ArtifactStore) -> None:
    barrier = threading.Barrier(8)
    wins: list[int] = []

    def claim(number: int) -> None:
        barrier.wait()
        if store.storage.create("claim", str(number).encode()):
            wins.append(number)

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(wins) == 1 and store.storage.read("claim") == str(wins[0]).encode()


def test_urls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ArtifactStore(f"file://{tmp_path}/with%20blank").local == tmp_path / "with blank"
    monkeypatch.chdir(tmp_path)
    assert ArtifactStore("relative").local == tmp_path / "relative"
    (tmp_path / "file").touch()
    for url, message in [
        ("ftp://host/x", "file://, s3://"),
        ("s3://key:secret@bucket/x", "carries credentials"),
        (str(tmp_path / "file"), "is a file"),
    ]:
        with pytest.raises(ArtifactError, match=message) as error:
            ArtifactStore(url)
        assert "secret" not in str(error.value)


def test_a_local_store_needs_no_object_store_packages(tmp_path: Path) -> None:
    script = (
        "import sys; sys.modules.update(dict.fromkeys(['obstore', 's3fs', 'boto3', 'fsspec']))\n"
        "import resources.store, resources.views\n"
        "store = resources.store.ArtifactStore(sys.argv[1])\n"
        "store.make('s', 'k', lambda draft: None, inputs={}, settings={})\n"
        "resources.views.connect(store).close()\n"
        "try: resources.store.ArtifactStore('s3://bucket/x')\n"
        "except resources.store.ArtifactError as error: print(error)\n"
    )
    child = start(script, str(tmp_path))
    out, _ = child.communicate()
    assert child.returncode == 0
    assert "pip install 'textalign-dagster[s3]'" in out


def test_code_revision_is_the_commit(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def revision() -> str:
        script = "from provenance import code_revision; print(code_revision())"
        done = subprocess.run(
            [sys.executable, "-c", script],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(tmp_path)},
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()

    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    # A separate checkout: the package determines where the project is.
    (tmp_path / "textalign_dagster").mkdir()
    for name in ("__init__.py", "ids.py"):
        shutil.copy(ROOT / "textalign_dagster" / name, tmp_path / "textalign_dagster")
    shutil.copy(ROOT / "resources" / "store" / "provenance.py", tmp_path)
    git("init", "--quiet")
    assert "\n" not in revision() and revision(), "without a commit, the version"
    git("add", ".")
    git("commit", "--quiet", "-m", "one")
    assert revision() == git("rev-parse", "HEAD")
    with (tmp_path / "textalign_dagster" / "__init__.py").open("a") as stream:
        stream.write("# changed\n")
    assert revision() == git("rev-parse", "HEAD") + "+changes"


def test_in_memory(tmp_path: Path) -> None:
    pytest.importorskip("obstore", reason="object stores need the extra s3")
    store = ArtifactStore("memory://store", cache=tmp_path / "one")
    artifact = make(store)
    other = ArtifactStore("memory://store", cache=tmp_path / "two")  # the same store, within this process
    assert other.find("numbers", "k1") == artifact
    assert other.find("numbers", "k1").frame("numbers").equals(FRAME)  # type: ignore[union-attr]
    store.remove("numbers", "k1")
    assert other.find("numbers", "k1") is None
