"""Prompts from datasets: splits, bad rows and how they are reported, the hub's cache."""

from __future__ import annotations

import gzip
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from tests.toy import environment, textalign
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.files import Library
from textalign_dagster.experiment.sources import held_out_prompts, source_hash, training_prompts
from textalign_dagster.loop.stages import stage_settings
from textalign_dagster.settings import SettingsError, validate
from textalign_dagster.tasks import Summarization, Toxicity


def post(name: str) -> str:
    return f"SUBREDDIT: r/x\nTITLE: {name}\nPOST: It is about {name}.\nTL;DR:"


def rows(*names: str) -> list[dict[str, Any]]:
    return [{"prompt": post(name), "label": f"About {name}."} for name in names]


def write(path: Path, content: Sequence[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in content)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode(), mtime=0))
    else:
        path.write_text(text, encoding="utf-8")
    return path


def task(**data: Any) -> Summarization:
    validated: Summarization = validate(Summarization, {"data": data}, "x")
    return validated


def folder(root: Path) -> Path:
    """A dataset with three splits, in the hub's layout."""
    write(root / "data" / "train-00000-of-00002.jsonl", rows("a", "b"))
    pl.DataFrame(rows("c")).write_parquet(root / "data" / "train-00001-of-00002.parquet")
    write(root / "data" / "valid.jsonl.gz", rows("v"))
    pl.DataFrame(rows("t", "u")).write_csv(root / "data" / "test.csv")
    write(root / "trained-models.jsonl", rows("no split's word"))
    return root


def test_splits_are_selected_by_words_of_a_path_or_by_patterns(tmp_path: Path) -> None:
    path = str(folder(tmp_path / "training data of a test"))  # words in the folder's own name do not count
    train, test = task(path=path).prompts("train"), task(path=path).prompts("evaluation")
    assert train["prompt"].to_list() == [post("a"), post("b"), post("c")]
    assert train["reference"].to_list() == ["About a.", "About b.", "About c."]
    assert test["prompt"].to_list() == [post("t"), post("u")]
    assert train["source"].unique().to_list() == ["training data of a test"]
    assert task(path=path, evaluation="valid").prompts("evaluation")["prompt"].to_list() == [post("v")]
    assert task(path=path, train="data/*.parquet").prompts("train")["prompt"].to_list() == [post("c")]
    with pytest.raises(SettingsError) as caught:
        task(path=path, evaluation="dev").prompts("evaluation")
    assert str(caught.value) == (
        "task.data.evaluation: no file of training data of a test matches 'dev' (it has: "
        "data/test.csv, data/train-00000-of-00002.jsonl, data/train-00001-of-00002.parquet, "
        "data/valid.jsonl.gz, trained-models.jsonl); name others, or hold prompts out with `held_out`"
    )


def test_held_out_prompts_of_a_single_file_depend_on_the_prompts_alone(tmp_path: Path) -> None:
    names = [str(i) for i in range(40)]
    path = write(tmp_path / "posts.jsonl", rows(*names))
    assert task(path=str(path)).prompts("train").height == 40
    with pytest.raises(SettingsError, match=r"no file of posts\.jsonl matches 'test'.*`held_out`"):
        task(path=str(path)).prompts("evaluation")
    data = {"path": str(path), "held_out": 10}
    train, held = (set(task(**data).prompts(split)["prompt"]) for split in ("train", "evaluation"))
    assert len(train) == 30 and len(held) == 10 and not train & held
    assert held != {post(name) for name in names[:10]}
    write(path, rows(*reversed(names)))
    os.utime(path, ns=(1, 1))
    assert set(task(**data).prompts("evaluation")["prompt"]) == held
    with pytest.raises(SettingsError, match="held_out: 40 requested of 40 prompts"):
        task(path=str(path), held_out=40).prompts("train")


def test_bad_rows_are_counted_by_reason_with_an_example(tmp_path: Path) -> None:
    good = rows(*(str(i) for i in range(93)), "twice", "twice")
    bad = [
        {"prompt": "A post without its end", "label": "x"},
        {"prompt": "  ", "label": "x"},
        {"prompt": 3, "label": "x"},
        {"label": "x"},
        {"prompt": post("?"), "label": ["x"]},
        {"prompt": "TL;DR:", "label": "x"},
        "{broken",
        "[1]",
    ]
    path = write(tmp_path / "train.jsonl", good + bad)
    write(tmp_path / "test.jsonl", rows("1", "2", "held out"))
    with pytest.raises(SettingsError) as caught:
        task(path=str(tmp_path)).prompts("train")
    message = str(caught.value)
    assert message.startswith(f"task.data: {tmp_path.name}, train: 11 of 103 rows left out: ")
    for reason in (
        f"2 × the prompt is among the held-out ones (train.jsonl, row 2: {post('1')!r}"[:70],
        "1 × a duplicate prompt (train.jsonl, row 95",
        "1 × the prompt does not end with 'TL;DR:' (train.jsonl, row 96: {'prompt': 'A post",
        "1 × a blank prompt (train.jsonl, row 97",
        "1 × prompt is not text (train.jsonl, row 98",
        "1 × no prompt (train.jsonl, row 99",
        "1 × reference is not text (train.jsonl, row 100",
        "1 × there is no post before the cue (train.jsonl, row 101",
        "2 × not a JSON object (train.jsonl, row 102)",
    ):
        assert reason in message
    assert "At most 0.01 of them may be (task.data.max_refused)" in message
    assert "there are: prompt, label" in message
    allowed = task(path=str(tmp_path), max_refused=0.2)
    assert allowed.prompts("train").height == 92
    assert not set(allowed.prompts("train")["prompt"]) & set(allowed.prompts("evaluation")["prompt"])
    (note,) = allowed.notes
    assert note.startswith(f"{tmp_path.name}, train: 11 of 103 rows left out: ")
    assert path.is_file()


def test_too_many_bad_rows_or_no_rows_are_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", [*rows(*(str(i) for i in range(9))), {"prompt": " "}])
    assert task(path=str(path), max_refused=0.1).prompts("train").height == 9
    with pytest.raises(SettingsError, match="1 of 10 rows left out"):
        task(path=str(path), max_refused=0.09).prompts("train")
    with pytest.raises(SettingsError, match="there are no rows"):
        task(path=str(write(tmp_path / "empty.jsonl", []))).prompts("train")


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_columns_can_be_renamed(tmp_path: Path, ending: str) -> None:
    content = [{"post": row["prompt"], "label": row["label"], "other": "x"} for row in rows("a", "b")]
    path = tmp_path / f"x.{ending}"
    if ending == "jsonl":
        write(path, content)
    elif ending == "csv":
        pl.DataFrame(content).write_csv(path)
    else:
        pl.DataFrame(content).write_parquet(path)
    with pytest.raises(SettingsError, match=r"2 × no prompt .*\(there are: post, label, other\)"):
        task(path=str(path)).prompts("train")
    prompts = task(path=str(path), columns={"prompt": "post"}).prompts("train")
    assert prompts["prompt"].to_list() == [post("a"), post("b")]
    with pytest.raises(SettingsError, match="the task does not read promt; it reads prompt, reference"):
        task(columns={"promt": "post"})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"hub": "a/b", "path": "x"}, "two sources; remove one of them"),
        ({"hub": "tldr"}, "'tldr' is not owner/name"),
        ({"revision": "main"}, "add hub, or remove it"),
        ({"held_out": 3}, "the embedded sample has held-out prompts"),
    ],
)
def test_contradictory_settings_are_rejected(data: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        task(**data)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (None, b"", "no such file or folder"),
        ("x.txt", b"x", "has no file that ends in .jsonl"),
        ("x.jsonl", b'{"prompt": "\xff"}', "not UTF-8"),
        ("x.jsonl.gz", b"no gzip", "cannot be read: "),
        ("x.jsonl.gz", gzip.compress(b"{}" * 9000, mtime=0)[:-9], "cannot be read: "),
        ("x.parquet", b"PAR1 no", "cannot be read: "),
        ("x.csv", b"", "cannot be read: "),
    ],
)
def test_unreadable_files_are_rejected(
    tmp_path: Path, name: str | None, content: bytes, message: str
) -> None:
    path = tmp_path / (name or "missing.jsonl")
    if name is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=r"^task\.data") as caught:
        task(path=str(path)).prompts("train")
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_only_changed_files_are_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jsonl", rows("a"))
    before = task(path=str(path)).prompts("train")
    assert task(path=str(path)).prompts("train") is before
    write(path, rows("a", "b"))
    assert task(path=str(path)).prompts("train").height == 2


def experiment(**task_settings: Any) -> Experiment:
    content = {"task": task_settings, "method": "no_feedback", "policy": {"model": "/nowhere"}}
    validated: Experiment = validate(Experiment, content, "x")
    return validated


def test_the_location_of_the_prompts_does_not_matter(tmp_path: Path) -> None:
    """Moving a dataset, or allowing another share of bad rows, makes nothing stale."""
    one, two = tmp_path / "one" / "posts", tmp_path / "two" / "posts"
    folder(one)
    shutil.copytree(one, two)
    first, second = (
        experiment(name="summarization", data={"path": str(path), "max_refused": share})
        for path, share in ((one, 0.0), (two, 0.1))
    )
    for stage in ("prompt_draws", "feedback", "evaluation"):
        assert stage_settings(first, stage, 1) == stage_settings(second, stage, 1)
    assert source_hash(training_prompts(first)) == source_hash(training_prompts(second))
    write(two / "data" / "train-00000-of-00002.jsonl", rows("a", "other"))
    assert source_hash(training_prompts(first)) != source_hash(training_prompts(second))


def test_a_path_is_relative_to_the_experiment_file(tmp_path: Path) -> None:
    write(tmp_path / "posts" / "train.jsonl", rows("a"))
    text = (
        "{task: {name: summarization, data: {path: posts}}, method: no_feedback, policy: {model: /nowhere}}"
    )
    (tmp_path / "mine.yaml").write_text(text)
    loaded = Library((tmp_path,)).load("mine")
    assert training_prompts(loaded)["prompt"].to_list() == [post("a")]


def test_the_task_also_processes_prompt_files(tmp_path: Path) -> None:
    """`evaluation.path`, for prompts of another domain."""
    stories = [
        {"prompt": "[ WP ] A door opens."},
        {"prompt": "[EU] A ship lands."},
        {"prompt": "[sic] Plain."},
    ]
    path = write(tmp_path / "stories.jsonl", stories)
    toxicity = experiment(name="toxicity").model_copy(
        update={"evaluation": experiment(name="toxicity").evaluation.model_copy(update={"path": str(path)})}
    )
    texts = held_out_prompts(toxicity)["prompt"].to_list()
    assert texts == ["A door opens.", "A ship lands.", "[sic] Plain."]
    kept = toxicity.model_copy(update={"task": Toxicity(remove_tags=False)})
    assert held_out_prompts(kept)["prompt"].to_list()[0] == "[ WP ] A door opens."
    write(path, [{"prompt": "[WP] A door opens."}, {"prompt": "A door opens."}])
    with pytest.raises(SettingsError, match="rows 1 and 2 are the same prompt as task toxicity reads them"):
        held_out_prompts(toxicity)
    write(path, [{"prompt": post("a")}, {"prompt": "no cue at all"}])
    cued = toxicity.model_copy(update={"task": Summarization()})
    with pytest.raises(SettingsError, match=r"row 2: task summarization cannot use it: .*'TL;DR:'"):
        held_out_prompts(cued)


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def test_a_hub_dataset_is_read_from_the_hubs_cache(home: Path, toys: Path, tmp_path: Path) -> None:
    """The hub's own folder layout, without the hub: refs name a commit, snapshots hold its files."""
    cache = tmp_path / "hub" / "datasets--someone--posts"
    folder(cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    (cache / "refs" / "v2").write_text(COMMIT, encoding="utf-8")
    content = """
        extends: toy
        control: null
        task: {name: summarization, data: {hub: someone/posts}}
        method: no_feedback
        datapool: {shares: null}
        prompts: {per_iteration: 2}
        evaluation: {prompts: 2, probe: false}
        training: {max_length: 64}
        """
    (toys / "posts.yaml").write_text(content)
    env = environment(home, toys) | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    env |= {"TEXTALIGN_EXPERIMENTS": f"{toys}{os.pathsep}{env['TEXTALIGN_EXPERIMENTS']}"}
    policy = ("--set", "policy.model=" + str(toy_policy()))
    output = textalign("validate", "posts", *policy, env=env, fork=False).stdout
    assert "prompts: 3, of which 2 per iteration" in output and "evaluation: 2 held-out prompts" in output
    pinned = textalign(
        "validate", "posts", *policy, "--set", "task.data.revision=v2", env=env, fork=False
    ).stdout
    assert "prompts: 3" in pinned
    for name, message in (
        ("someone/else", "task.data.hub: someone/else cannot be loaded from the hub"),
        ("someone", "is not owner/name"),
    ):
        refused = textalign(
            "validate", "posts", *policy, "--set", f"task.data.hub={name}", env=env, ok=False, fork=False
        )
        assert message in refused.stderr


def toy_policy() -> Path:
    """The shipped policy's folder."""
    from textalign_dagster.tasks import Pep8

    return Path(Pep8().builtin_policy("pep8-sloppy-1m") or "")


def test_the_commit_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    cache = tmp_path / "datasets--someone--more-posts"
    folder(cache / "snapshots" / COMMIT)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    prompts = task(hub="someone/more-posts").prompts("train")
    assert prompts.select("source", "source_revision").unique().rows() == [("someone/more-posts", COMMIT)]
