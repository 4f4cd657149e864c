"""The dialogue task: prompts from its sources, chat templates, measures and the shipped experiments."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pydantic import ValidationError

from tests.resources.engines import tiny_models
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.files import Library
from textalign_dagster.experiment.sources import held_out_prompts, training_prompts
from textalign_dagster.settings import SettingsError, validate, write_yaml
from textalign_dagster.tasks import Dialogue
from textalign_dagster.tasks.dialogue.measuring import CATEGORIES, MEASURES
from textalign_dagster.turns import parse_transcript


def hh(*turns: str) -> str:
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[i % 2]}: {text}" for i, text in enumerate(turns))


def source(folder: Path, rows: list[dict[str, Any]], *, held_out: list[dict[str, Any]]) -> Path:
    """A folder laid out like HH on the hub: a subfolder per kind with gzipped JSON Lines."""
    for name, content in (("train", rows), ("test", held_out)):
        (folder / "kind").mkdir(parents=True, exist_ok=True)
        with gzip.open(folder / "kind" / f"{name}.jsonl.gz", "wt", encoding="utf-8") as stream:
            stream.write("\n".join(json.dumps(row) for row in content))
    return folder


def task(**settings: Any) -> Dialogue:
    validated: Dialogue = validate(Dialogue, settings, "x")
    return validated


def test_the_embedded_sample() -> None:
    train, evaluation = task().prompts("train"), task().prompts("evaluation")
    assert train.height + evaluation.height >= 60 and evaluation.height >= 20
    assert not set(train["prompt"]) & set(evaluation["prompt"])
    for prompt in (*train["prompt"], *evaluation["prompt"]):
        turns = parse_transcript(prompt)
        assert len(turns) >= 4 and prompt.startswith("Human: ") and prompt.endswith("\n\nAssistant:")
        assert [turn.role for turn in turns] == ["user", "assistant"] * (len(turns) // 2)
    assert train["reference"].null_count() == evaluation["reference"].null_count() == 0
    assert task().notes == ()


def test_pairs_of_hh_yield_each_prompt_once(tmp_path: Path) -> None:
    rows = [
        {"chosen": hh("Hi", "Hello!", "Bye?", "Bye."), "rejected": hh("Hi", "Hello!", "Bye?", "No.")},
        {"chosen": hh("Hi", "Hello!", "Bye?", "See you."), "rejected": hh("Hi", "Hello!", "Bye?", "")},
        {"chosen": hh("Held out?", "Yes."), "rejected": hh("Held out?", "No.")},
        {"chosen": hh("One", "Two") + "\n\nHuman: left", "rejected": "x"},
    ]
    folder = source(tmp_path, rows, held_out=[{"chosen": hh("Held out?", "Indeed."), "rejected": ""}])
    dialogue = task(data={"path": str(folder), "max_refused": 0.75})
    assert dialogue.prompts("train").select("prompt", "reference").rows() == [
        ("Human: Hi\n\nAssistant: Hello!\n\nHuman: Bye?\n\nAssistant:", "Bye.")
    ]
    assert dialogue.prompts("evaluation")["reference"].to_list() == ["Indeed."]
    note = dialogue.notes[0]
    for reason in (
        "a duplicate prompt",
        "the prompt is among the held-out",
        "`chosen` does not end with the assistant",
    ):
        assert f"1 × {reason}" in note
    with pytest.raises(SettingsError, match="3 of 4 rows left out"):
        task(data={"path": str(folder), "max_refused": 0.5}).prompts("train")


def test_long_dialogues_lose_their_beginning_and_too_long_ones_are_counted(tmp_path: Path) -> None:
    rows = [{"chosen": hh("a" * 50, "b", "c", "d")}, {"chosen": hh("e" * 50, "f")}]
    folder = source(tmp_path, rows, held_out=[{"chosen": hh("g", "h")}])
    dialogue = task(data={"path": str(folder), "max_refused": 0.5}, max_characters=40)
    assert dialogue.prompts("train")["prompt"].to_list() == ["Human: c\n\nAssistant:"]
    assert "1 × its last turn alone is longer than 40 characters" in dialogue.notes[0]


def test_held_out_prompts_are_shuffled_and_training_prompts_keep_their_order(tmp_path: Path) -> None:
    rows = [{"chosen": hh(f"Question {i}", "x")} for i in range(20)]
    held_out = [{"chosen": hh(f"Held out {i}", "x")} for i in range(20)]
    dialogue = task(data={"path": str(source(tmp_path / "a", rows, held_out=held_out))})

    def numbers(split: Any) -> list[int]:
        return [int(re.findall(r"\d+", prompt)[0]) for prompt in dialogue.prompts(split)["prompt"]]

    assert numbers("train") == list(range(20))
    assert numbers("evaluation") != list(range(20)) and sorted(numbers("evaluation")) == list(range(20))
    other = task(data={"path": str(source(tmp_path / "b", rows, held_out=held_out[::-1]))})
    assert other.prompts("evaluation")["prompt"].equals(dialogue.prompts("evaluation")["prompt"])


def test_messages_in_parquet(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Assistant: is a word"}, {"role": "assistant", "content": "So?"}]
    for split in ("train", "test"):
        rows = [[{**m, "content": f"{m['content']} {split}"} for m in messages]]
        pl.DataFrame({"messages": rows}).write_parquet(tmp_path / f"{split}.parquet")
    prompts = task(data={"path": str(tmp_path)}).prompts("train")
    assert prompts.select("prompt", "reference").rows() == [
        ("Human: Assistant: is a word train\n\nAssistant:", "So? train")
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format": "chat_template"}, "belong together"),
        ({"chat_template": "model"}, "belong together"),
        ({"max_turns": 0}, "greater than or equal to 1"),
    ],
)
def test_invalid_settings_are_rejected(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValidationError, SettingsError), match=message):
        task(**settings)


def experiment(folder: Path, **task_settings: Any) -> Experiment:
    content = {
        "task": {"name": "dialogue", **task_settings},
        "method": "no_feedback",
        "policy": {"model": str(folder)},
    }
    validated: Experiment = validate(Experiment, content, "x")
    return validated


def test_prompts_use_the_policys_own_chat_template(tmp_path: Path) -> None:
    folder = tiny_models.save(tmp_path / "model", "llama")
    mine = experiment(folder, format="chat_template", chat_template="model")
    with pytest.raises(SettingsError, match="has no chat template; give a file with one"):
        training_prompts(mine)
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    (folder / "chat_template.jinja").write_text(template)
    for prompts in (training_prompts(mine), held_out_prompts(mine)):
        assert all(re.fullmatch(r"<user>.*<assistant>", prompt, re.S) for prompt in prompts["prompt"])
    (folder / "chat_template.jinja").write_text(template.replace("<", "["))
    assert training_prompts(mine)["prompt"][0].startswith("[user>")  # an edited template takes effect at once


def test_a_template_path_is_relative_to_the_experiment_file(tmp_path: Path) -> None:
    (tmp_path / "short.jinja").write_text("{{ messages[-1].content }}:")
    content = {
        "task": {"name": "dialogue", "format": "chat_template", "chat_template": "short.jinja"},
        "method": "no_feedback",
        "policy": {"model": "nobody/nothing"},
    }
    (tmp_path / "mine.yaml").write_text(write_yaml(content))
    mine = Library((tmp_path,)).load("mine")
    assert "Blue tits.:" in training_prompts(mine)["prompt"].to_list()


def test_a_file_of_prompts_is_read_as_dialogues(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"prompt": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"}))
    content = experiment(tmp_path, max_turns=1).model_dump(mode="json") | {"prompts": {"path": str(path)}}
    mine: Experiment = validate(Experiment, content, "x")
    assert training_prompts(mine)["prompt"].to_list() == ["Human: c\n\nAssistant:"]
    path.write_text(json.dumps({"prompt": "Human: no cue"}))
    with pytest.raises(SettingsError, match=r"row 1: .* does not end with `Assistant:`"):
        training_prompts(mine)


def test_the_measures_match_the_shipped_judge() -> None:
    from textalign_dagster.judging import load_template
    from textalign_dagster.methods import AltLMC, SteerLM

    assert tuple(CATEGORIES.values()) == load_template("harm_category").labels
    assert AltLMC().categories == SteerLM().categories == tuple(CATEGORIES.values())
    samples = pl.DataFrame(
        {"sample_id": "a", "text": "x", "finish_reason": "stop", "score": None, "label": "Harmful"}
    )
    measured = task().measure(samples)
    assert {m.numerator for m in MEASURES} <= set(measured.columns)


@pytest.mark.parametrize("name", ["hh_alt_lmc", "hh_steerlm", "hh_no_feedback"])
def test_the_papers_settings(name: str) -> None:
    loaded = Library.default().load(name)
    assert (loaded.prompts.per_iteration, loaded.sampling.samples_per_prompt) == (2048, 20)
    assert (loaded.sampling.temperature, loaded.sampling.top_p, loaded.sampling.max_new_tokens) == (
        1.0,
        0.9,
        256,
    )
    assert (loaded.datapool.samples, loaded.datapool.per, loaded.datapool.drop_factor) == (8, "prompt", 1.0)
    rows = loaded.prompts.per_iteration * (loaded.datapool.samples or 0)
    steps = rows * loaded.training.epochs / (loaded.training.batch_size * loaded.training.processes)
    assert steps == 512
    assert (loaded.training.learning_rate, loaded.training.objective.entropy_coef) == (2e-5, 0.06)
    assert loaded.training.objective.kl_coef == 0
    assert (loaded.evaluation.prompts, loaded.evaluation.samples_per_prompt) == (1000, 1)
    assert loaded.evaluation.judge is not None and loaded.evaluation.judge.template == "harm_category"


def test_a_judge_and_its_method_must_have_the_same_categories(tmp_path: Path) -> None:
    """A label unknown to the method would be paid for but never trained on."""
    pytest.importorskip("openai", reason="needs the extra `judges`")
    from textalign_dagster.cli.preflight import preflight
    from textalign_dagster.judging.catalogue import shipped
    from textalign_dagster.settings import read_yaml

    tiny_models.save(tmp_path / "model", "llama")
    template = read_yaml(shipped()["harm_category"])
    template["labels"] = [*template["labels"], "Neither"]
    (tmp_path / "five.yaml").write_text(write_yaml(template))
    (tmp_path / "experiments").mkdir()
    content = {
        "task": "dialogue",
        "method": "steerlm",
        "policy": {"model": str(tmp_path / "model")},
        "judge": {
            "model": "m",
            "api_key_env": None,
            "template": str(tmp_path / "five.yaml"),
            "ask": "category",
        },
        "prompts": {"per_iteration": 2, "path": "train.jsonl"},
        "evaluation": {"prompts": 2, "path": "held_out.jsonl"},
        "training": {"max_length": 64},
        "sampling": {"max_new_tokens": 2},
    }
    for name in ("train", "held_out"):
        rows = [json.dumps({"prompt": f"Human: {name[0]}{i}\n\nAssistant:"}) for i in range(2)]
        (tmp_path / "experiments" / f"{name}.jsonl").write_text("\n".join(rows))
    (tmp_path / "experiments" / "mine.yaml").write_text(write_yaml(content))
    library = Library((tmp_path / "experiments",))
    with pytest.raises(SettingsError, match="also sorts into Neither"):
        preflight(library, "mine")
    categories = 'method.categories=["Harmful", "Harmless"]'
    with pytest.raises(SettingsError, match="Harmless is not a label of the template"):
        preflight(library, "mine", [categories, 'method.attributes=["a", "b"]'])
