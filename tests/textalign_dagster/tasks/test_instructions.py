"""Instructions in Alpaca's format, and AlpacaEval's prompt file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from pydantic import ValidationError

from tests.resources.engines import tiny_models
from textalign_dagster.experiment import Experiment
from textalign_dagster.experiment.evaluation import evaluation_prompts
from textalign_dagster.experiment.sources import held_out_prompts, training_prompts, written_prompts
from textalign_dagster.reports.score_table import reported
from textalign_dagster.settings import SettingsError, validate
from textalign_dagster.tasks.instructions import ALPACA, Instructions


def experiment(folder: Path, task: dict[str, Any] | None = None, **changes: Any) -> Experiment:
    content = {
        "task": {"name": "instructions", **(task or {})},
        "method": "no_feedback",
        "policy": {"model": str(folder)},
        **changes,
    }
    validated: Experiment = validate(Experiment, content, "here.yaml")
    return validated


def write(path: Path, *rows: Any) -> str:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return str(path)


def test_the_input_follows_the_instruction(tmp_path: Path) -> None:
    rows = [
        {"instruction": "Add.", "input": "1, 2", "output": "3"},
        {"instruction": "Sing.", "input": "", "output": ""},
        {"instruction": " ", "input": "x", "output": "y"},
        {"instruction": "Add.", "input": "1, 2", "output": "4"},
    ]
    data = {"path": write(tmp_path / "alpaca_data.json", *rows), "max_refused": 0.5}
    mine = experiment(tmp_path, {"data": data})
    shown = [ALPACA.replace("{instruction}", text) for text in ("Add.\n1, 2", "Sing.")]
    assert training_prompts(mine).select("prompt", "reference").rows() == [(shown[0], "3"), (shown[1], None)]
    other = experiment(tmp_path, {"data": data, "template": "Q: {instruction}\nA:", "input_separator": " | "})
    assert training_prompts(other)["prompt"].to_list() == ["Q: Add. | 1, 2\nA:", "Q: Sing.\nA:"]


def test_the_embedded_sample() -> None:
    train, held_out = (Instructions().prompts(split) for split in ("train", "evaluation"))
    assert train.height == 24 and held_out.height == 12
    assert train["prompt"].str.starts_with("Below is an instruction").all()


def test_alpaca_evals_file_provides_prompts_and_references(tmp_path: Path) -> None:
    rows = [
        {
            "dataset": "koala",
            "instruction": f"Do {i}.",
            "output": f"Done {i}.",
            "generator": "text_davinci_003",
        }
        for i in range(5)
    ]
    path = write(tmp_path / "alpaca_eval.json", *rows)
    mine = experiment(tmp_path, evaluation={"path": path, "prompts": 5})
    shown = [ALPACA.replace("{instruction}", f"Do {i}.") for i in range(5)]
    prompts = evaluation_prompts(mine)
    assert prompts.select("prompt", "reference").rows() == [(shown[i], f"Done {i}.") for i in range(5)]
    # As they are in the file, for output written for AlpacaEval.
    assert written_prompts(mine) == {shown[i]: f"Do {i}." for i in range(5)}


def test_conversations_need_a_chat_template(tmp_path: Path) -> None:
    task = Instructions()
    assert task.cleaned("Human: Sing.\n\nAssistant:") == task.cleaned("Sing.")
    with pytest.raises(ValueError, match="several turns"):
        task.cleaned("Human: Sing.\n\nAssistant: No.\n\nHuman: Please.\n\nAssistant:")
    folder = tiny_models.save(tmp_path / "model", "llama")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    )
    path = write(tmp_path / "p.json", {"prompt": "Human: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"})
    mine = experiment(folder, {"chat_template": "model"}, prompts={"path": path})
    assert training_prompts(mine)["prompt"].to_list() == ["<user>a<assistant>b<user>c<assistant>"]
    assert all(prompt.endswith("<assistant>") for prompt in held_out_prompts(mine)["prompt"])


def test_errors_name_bad_input(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"\{instruction\} must appear exactly once"):
        Instructions(template="Do it.")
    broken = tmp_path / "broken.json"
    broken.write_text("[{]")
    for content in ({"prompts": {"path": str(broken)}}, {"task": {"data": {"path": str(broken)}}}):
        with pytest.raises(SettingsError, match=r"broken\.json:1: broken JSON"):
            training_prompts(experiment(tmp_path, content.pop("task", None), **content))
    path = write(tmp_path / "p.json", {"question": "?"})
    with pytest.raises(SettingsError, match="row 1: no text in `prompt` or `instruction`"):
        training_prompts(experiment(tmp_path, prompts={"path": path}))


def test_the_measures() -> None:
    samples = pl.DataFrame(
        {
            "sample_id": ["a", "b"],
            "text": [" One two.", ""],
            "finish_reason": ["length", "stop"],
        }
    )
    measured = Instructions().measure(samples)
    assert measured.select("words", "cut_off").rows() == [(2.0, 1.0), (0.0, 0.0)]
    judge = {"model": "j", "base_url": "http://x/v1", "api_key_env": None, "template": "win", "ask": "win"}
    names = [measure.name for measure in reported(experiment(Path("x"), evaluation={"judge": judge}))]
    assert names[:4] == ["win_rate", "judge_unusable", "words", "cut_off"]
    assert {measure.numerator for measure in Instructions().measures} == set(measured.columns) - {"sample_id"}
