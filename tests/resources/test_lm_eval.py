"""lm-evaluation-harness on a checkpoint: a custom task, its accuracy compared with plain log-probabilities."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean

import pytest

from resources.engines.transformers.sampler import TransformersSampler
from resources.lm_eval import LMEvalError, identity, read_results, run
from textalign_dagster import PROJECT
from textalign_dagster.settings.lm_eval import LMEval
from textalign_dagster.tables import LM_EVAL
from textalign_dagster.tasks.pep8 import POLICIES

pytestmark = pytest.mark.usefixtures("quick")

POLICY = Path(POLICIES["pep8-sloppy-1m"])
QUESTIONS = [
    ("def area(self):\n    return", [" self.width * self.height", " colourless green ideas"], 0),
    ("import os\nimport", [" Wednesday", " sys"], 1),
    ("for i in", [" range(10):", " 10(range):"], 1),  # the answer is wrong on purpose
    ("x = [1, 2,", [" 3]", " $$$"], 0),
]
TASK = """
task: toy_python
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1.0}}
"""


HARNESS = PROJECT / ".venv" / "harness"
"""Where `make harness` installs it."""

if not (HARNESS / "lm_eval").is_dir():
    pytest.skip("needs lm-evaluation-harness: make harness", allow_module_level=True)


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HARNESS))
    monkeypatch.setenv("PYTHONPATH", str(HARNESS))


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": q, "choices": c, "answer": a} for q, c, a in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (folder / "toy.yaml").write_text(TASK.format(data=folder / "questions.jsonl"))
    return folder


def test_accuracy_equals_that_of_plain_log_probabilities(tasks: Path) -> None:
    settings = LMEval(tasks=("toy_python",), path=str(tasks), batch_size=2)
    results = run(settings, POLICY, "float32", trust_remote_code=False, seed=0)
    assert results.schema == LM_EVAL and results.height == 1
    row = results.row(0, named=True)
    assert (row["task"], row["metric"], row["n"], row["fewshot"]) == ("toy_python", "acc", 4, 0)
    with TransformersSampler() as engine:
        pairs = [(question, choice) for question, choices, _ in QUESTIONS for choice in choices]
        scores = [score for score, _ in engine.logprobs(POLICY, pairs)]
    picked = [int(second > first) for first, second in zip(scores[::2], scores[1::2], strict=True)]
    hits = [choice == answer for choice, (*_, answer) in zip(picked, QUESTIONS, strict=True)]
    assert row["value"] == pytest.approx(mean(hits)) and not all(hits)
    # The standard error of a mean of four.
    spread = sum((hit - mean(hits)) ** 2 for hit in hits) / 3
    assert row["stderr"] == pytest.approx((spread / 4) ** 0.5)


def test_the_harness_error_is_shown_when_it_fails(tasks: Path) -> None:
    with pytest.raises(
        LMEvalError, match=r"(?s)^evaluation\.lm_eval: the harness failed .*exit code [1-9].*nothere"
    ):
        run(LMEval(tasks=("nothere",), path=str(tasks)), POLICY, "float32", trust_remote_code=False, seed=0)


def test_groups_and_filters_have_their_own_rows() -> None:
    results = {
        "results": {
            "gsm8k": {"alias": "gsm8k", "exact_match,strict": 0.25, "exact_match_stderr,strict": 0.1},
            "mmlu": {"acc,none": 0.5, "acc_stderr,none": "N/A"},
        },
        "groups": {"mmlu": {"acc,none": 0.5, "acc_stderr,none": "N/A"}},
        "versions": {"gsm8k": 3, "mmlu": 2},
        "n-shot": {"gsm8k": 5},
        "n-samples": {"gsm8k": {"original": 1319, "effective": 10}},
    }
    assert read_results(results).rows() == [
        ("gsm8k", "exact_match (strict)", 0.25, 0.1, 10, 5, "3"),
        ("mmlu", "acc", 0.5, None, None, None, "2"),
    ]


def test_an_edited_task_file_changes_the_identity(tasks: Path) -> None:
    settings = LMEval(tasks=("toy_python",), path=str(tasks))
    before = identity(settings)
    assert identity(settings.model_copy(update={"batch_size": 7})) == before
    (tasks / "toy.yaml").write_text((tasks / "toy.yaml").read_text() + "\n# edited\n")
    assert identity(settings) != before
