"""Prompts, responses and judgements from a file, in place of the policy's samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.evaluation import evaluation_prompts
from textalign_dagster.experiment.offline import (
    held_out_responses,
    offline_feedback,
    offline_samples,
    summary,
)
from textalign_dagster.experiment.sources import held_out_prompts, task_of, training_prompts
from textalign_dagster.loop.stages import stage_settings
from textalign_dagster.methods import CUT
from textalign_dagster.prompts import prompt_id
from textalign_dagster.settings import SettingsError, validate

PAIRS = [
    {"prompt": "P", "chosen": "good", "rejected": "\tbad"},
    {"prompt": "P", "chosen": "good", "rejected": "middling"},
    {"prompt": "P", "chosen": "middling", "rejected": "\tbad"},
    {"prompt": "Q\n", "chosen": "yes", "rejected": "no"},
    {"prompt": "R", "completion": "alone"},
]


def experiment(tmp_path: Path, records: list[Any] = PAIRS, **changes: Any) -> Experiment:
    path = tmp_path / "file.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    plain = {
        "task": {"name": "pep8"},
        "method": {"name": "dpo"},
        "policy": {"model": "pep8-sloppy-1m"},
        **changes,
        "offline": {"path": str(path), **changes.get("offline", {})},
    }
    return validate(Experiment, plain, "here.yaml")


def draws(*prompts: str) -> pl.DataFrame:
    ids = [prompt_id(prompt) for prompt in prompts]
    return pl.DataFrame(
        {"draw_id": [f"draw{i}" for i in range(len(ids))], "prompt_id": ids, "prompt": list(prompts)}
    )


def test_prompts_come_from_the_file_with_the_best_response_as_reference(tmp_path: Path) -> None:
    mine = experiment(tmp_path)
    prompts = training_prompts(mine)
    assert prompts.select("prompt", "reference").rows() == [("P", " good"), ("Q\n", "yes"), ("R", None)]
    assert set(prompts["source"]) == {"file.jsonl"}
    # The evaluation uses the task's own prompts.
    assert held_out_prompts(mine).height > 100


def test_held_out_prompts_are_not_trained_on(tmp_path: Path) -> None:
    mine = experiment(tmp_path, offline={"held_out": 2})
    trained, held_out = (set(f(mine)["prompt"]) for f in (training_prompts, held_out_prompts))
    assert len(trained) == 1 and len(held_out) == 2 and not trained & held_out
    responses = held_out_responses(mine, task_of(mine))
    assert set(responses["prompt"]) == held_out
    with pytest.raises(
        SettingsError,
        match=r"evaluation\.prompts: 192 requested, but there are only 2 in offline\.held_out of ",
    ):
        evaluation_prompts(mine)
    with pytest.raises(SettingsError, match=r"held_out: 3, but .* has 3 prompts"):
        training_prompts(experiment(tmp_path, offline={"held_out": 3}))


def test_a_response_is_a_sample_for_every_draw_of_its_prompt(tmp_path: Path) -> None:
    mine = experiment(tmp_path)
    found = offline_samples(mine, task_of(mine), draws("Q\n", "P", "Q\n"))
    # A text is preceded by a space unless its prompt ends, or it begins, with whitespace.
    assert found.select("draw_id", "text", "sample_index").rows() == [
        ("draw0", "yes", 0), ("draw0", "no", 1),
        ("draw1", " good", 0), ("draw1", "\tbad", 1), ("draw1", " middling", 2),
        ("draw2", "yes", 0), ("draw2", "no", 1),
    ]  # fmt: skip
    assert found["sample_id"].is_unique().all()


def test_comparisons_give_shares_of_points_and_pairs(tmp_path: Path) -> None:
    mine, drawn = experiment(tmp_path), draws("P", "R", "Q\n", "Q\n")
    samples = offline_samples(mine, task_of(mine), drawn)
    found = offline_feedback(mine, task_of(mine), drawn, "reward")
    assert found.rows["sample_id"].equals(samples["sample_id"])
    assert found.rows["value"].to_list() == [1.0, 0.0, 0.5, None, 1.0, 0.0, 1.0, 0.0]
    assert found.rows["status"].to_list() == ["ok"] * 3 + ["skipped"] + ["ok"] * 4
    assert found.pairs is not None
    texts = dict(samples.select("sample_id", "text").iter_rows())
    won = [
        (texts[a], texts[b]) if winner == "a" else (texts[b], texts[a])
        for a, b, winner in found.pairs.select("sample_a", "sample_b", "winner").iter_rows()
    ]
    assert sorted(won) == [
        (" good", "\tbad"), (" good", " middling"), (" middling", "\tbad"), ("yes", "no"), ("yes", "no"),
    ]  # fmt: skip


def test_keys_depend_on_the_content_not_the_path(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    first, moved = (experiment(tmp_path / name) for name in ("a", "b"))
    stages = ("generations", "feedback")
    before = [stage_settings(first, stage, 1) for stage in stages]
    assert [stage_settings(moved, stage, 1) for stage in stages] == before
    experiment(tmp_path / "b", PAIRS[:2])  # different content at the same path
    assert not any(
        stage_settings(moved, *arguments, 1) == key
        for arguments, key in zip([(s,) for s in stages], before, strict=True)
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompts": {"path": "prompts.jsonl"}}, "prompts.path: the prompts are those of offline.path"),
        ({"method": {"name": "grpo"}, "training": {"batch_size": 16}}, "is defined for the policy's own samples"),
        ({"method": {"name": "rm_rankings"}}, "offline.held_out: missing"),
        ({"method": {"name": "unlikelihood"}}, "needs feedback of kind 'spans', which a file"),
    ],
)  # fmt: skip
def test_incompatible_settings(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        experiment(tmp_path, **changes)


def test_unusable_files(tmp_path: Path) -> None:
    broken = [*PAIRS, {"question": "?"}]
    mine = experiment(tmp_path, broken)
    with pytest.raises(SettingsError, match=r"1 of 6 rows cannot be read.*skip_refused\n[\s\S]*line 6"):
        training_prompts(mine)
    skipping = experiment(tmp_path, broken, offline={"skip_refused": True})
    assert training_prompts(skipping).height == 3 and "refused: 1" in summary(skipping, task_of(skipping))
    unjudged = experiment(tmp_path, [{"prompt": "P", "completion": "x"}])
    with pytest.raises(SettingsError, match="has no judgement of the kind that method dpo needs, reward"):
        summary(unjudged, task_of(unjudged))
    Path(str(unjudged.offline and unjudged.offline.path)).unlink()
    with pytest.raises(SettingsError, match=r"offline\.path: .*file\.jsonl: no such file"):
        training_prompts(unjudged)


def test_cut_judgments(tmp_path: Path) -> None:
    judgments = [None, "The end is missing.", "$ERROR$", "Perfect! But the end is missing.", ""]
    path = tmp_path / "cut.json"
    records = [
        {"instruction": "P", "input": "", "output": f"text {i}", "judgment": judgment}
        for i, judgment in enumerate(judgments)
    ]
    path.write_text(json.dumps(records), encoding="utf-8")
    method = {"name": "cut", "satisfied_per_judged": None}
    mine = experiment(tmp_path, method=method, offline={"path": str(path), "format": "cut"})
    found = offline_feedback(mine, task_of(mine), draws("P"), "judgment").rows
    assert found.select("status", "text").rows()[:2] == [("ok", None), ("ok", "The end is missing.")]
    assert found["status"].to_list()[2:] == ["failed", "unparseable", "unparseable"]
    rows = found.with_columns(prompt_id=pl.lit("p"))
    assert CUT().label(rows)["label"].to_list() == ["satisfied", "judged", None, None, None]


def test_amended_responses_beat_the_originals(tmp_path: Path) -> None:
    records = [
        {"instruction": "P", "input": "", "output": "bad", "judgment": "wrong", "i_ans": "good"},
        {"instruction": "P", "input": "", "output": "fine", "judgment": None},
        {"instruction": "Q", "input": "", "output": "same", "judgment": "hm", "i_ans": "same"},
    ]
    path = tmp_path / "judged.json"
    path.write_text(json.dumps(records), encoding="utf-8")
    settings = {"path": str(path), "format": "cut", "refinements": True}
    mine = experiment(tmp_path, offline=settings)
    found = offline_samples(mine, task_of(mine), draws("P"))
    assert found["text"].to_list() == [" bad", " fine", " good"]
    ids = dict(zip(("bad", "fine", "good"), found["sample_id"], strict=True))
    judged = offline_feedback(mine, task_of(mine), draws("P"), "reward")
    values = dict(judged.rows.select("sample_id", "value").iter_rows())
    assert values == {ids["bad"]: 0.0, ids["fine"]: None, ids["good"]: 1.0}
    assert judged.pairs is not None and judged.pairs.height == 1
    # The judgments are still available to methods that read them.
    judgments = offline_feedback(mine, task_of(mine), draws("P"), "judgment").rows
    assert dict(judgments.select("sample_id", "text").iter_rows())[ids["bad"]] == "wrong"
    # Without the setting, a file's key stays the same as before.
    plain = experiment(tmp_path, offline={**settings, "refinements": False}).offline
    assert plain is not None and "refinements" not in plain.reading
    # An amendment that already is a response is not added twice.
    more = {"instruction": "P", "input": "", "output": "worse", "judgment": "wrong", "i_ans": "fine "}
    path.write_text(json.dumps([*records, more]), encoding="utf-8")
    found = offline_samples(mine, task_of(mine), draws("P"))
    assert sorted(found["text"]) == [" bad", " fine", " good", " worse"]
    both = offline_feedback(mine, task_of(mine), draws("P"), "reward")
    texts = dict(found.select("sample_id", "text").iter_rows())
    assert {texts[i]: v for i, v in both.rows.select("sample_id", "value").iter_rows()} == {
        " bad": 0.0, " fine": 1.0, " good": 1.0, " worse": 0.0
    }  # fmt: skip
    path.write_text(json.dumps(records[1:]), encoding="utf-8")
    with pytest.raises(SettingsError, match=r"offline\.refinements: .* has no amended response"):
        offline_samples(mine, task_of(mine), draws("P"))
    with pytest.raises(SettingsError, match="refinements: only files of judgments have amended responses"):
        experiment(tmp_path, offline={"refinements": True})


def test_task_parses_the_prompts_of_the_file(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "Old?"}, {"role": "assistant", "content": "Yes."}]
    turns.append({"role": "user", "content": "New?"})
    pair = {"prompt": turns, "chosen": [{"role": "assistant", "content": "A"}], "rejected": "B"}
    # The oldest turns are dropped, never the latest one or the response.
    task = {"name": "dialogue", "max_turns": 1}
    mine = experiment(tmp_path, [pair], task=task)
    found = offline_samples(mine, task_of(mine), draws("Human: New?\n\nAssistant:"))
    assert found["text"].to_list() == [" A", " B"]
    plain = experiment(tmp_path, PAIRS, task=task)
    with pytest.raises(
        SettingsError, match=r"task dialogue cannot use 3 of its prompts, e.g. 'P': does not begin"
    ):
        training_prompts(plain)
