"""A language model as the judge: its prompts, how its judgments are parsed, and which models are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import polars as pl
import pytest

from resources.engines.sampler import Completion, Decoding, Request, Sampler
from resources.judge_models import check_judge_model, written_judgments
from resources.store import ArtifactError, ArtifactStore
from tests.resources.engines import tiny_models
from textalign_dagster.scorers import JudgeModel
from textalign_dagster.settings import SettingsError


class FakeEngine:
    """An engine that generates fixed texts and records its prompts."""

    def __init__(self, *written: tuple[str, str]) -> None:
        self.written, self.prompts = written, list[str]()

    def generate(
        self, model: Path, requests: Sequence[Request], decoding: Decoding, progress: Any = None
    ) -> list[list[Completion]]:
        assert decoding.temperature == 0 and decoding.max_new_tokens == 8
        self.prompts += [request.prompt for request in requests]
        return [[Completion(text, 8, cast(Any, reason), -1.0)] for text, reason in self.written]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_models.save(tmp_path_factory.mktemp("judge") / "model", "llama")


def judged(folder: Path, texts: Sequence[str], *written: tuple[str, str]) -> tuple[pl.DataFrame, list[str]]:
    samples = pl.DataFrame(
        {"sample_id": [f"s{i}" for i in range(len(texts))], "prompt": "def f():", "text": texts}
    )
    engine = FakeEngine(*written)
    judge = JudgeModel(model=str(folder), question="\n# lint: ", max_new_tokens=8)
    return written_judgments(judge, samples, cast(Sampler, engine), lambda *_: None), engine.prompts


def test_each_text_is_judged_once_and_gets_its_judgment(folder: Path) -> None:
    rows, prompts = judged(
        folder, ["x=1", "x = 1", "x=1"], (" E225 missing whitespace", "stop"), ("Perfect.", "stop")
    )
    assert prompts == ["def f():x=1\n# lint: ", "def f():x = 1\n# lint: "]
    flawed = ("flawed", "E225 missing whitespace", "ok", None)
    assert rows.rows() == [("s0", *flawed), ("s1", "perfect", None, "ok", None), ("s2", *flawed)]


@pytest.mark.parametrize(
    ("written", "reason", "why"),
    [
        ("E225 missing", "length", "cut off after 8 tokens"),
        (" \n", "stop", "has no words"),
        ("$ERROR$", "stop", "has no words"),
        ("The response is perfect and helpful.", "stop", "praise, but not the word"),
    ],
)
def test_replies_without_a_judgment_are_unparseable(
    folder: Path, written: str, reason: str, why: str
) -> None:
    rows, _ = judged(folder, ["x=1"], (written, reason))
    row = rows.row(0, named=True)
    assert (row["status"], row["label"], row["text"]) == ("unparseable", None, None) and why in row["reason"]


def test_a_sample_that_does_not_fit_is_skipped_and_the_others_are_judged(folder: Path) -> None:
    context = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
    rows, prompts = judged(folder, ["x = 1\n" * context, "x=1"], ("E225", "stop"))
    assert len(prompts) == 1 and rows["status"].to_list() == ["skipped", "ok"]
    assert f"exceed the judge's context of {context}" in rows["reason"][0]


def test_a_model_that_cannot_generate_text_is_refused(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path / "store"))
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["LlamaForSequenceClassification"]}))
    with pytest.raises(
        SettingsError, match=r"^scorer\.model: .* is a LlamaForSequenceClassification, which does not"
    ):
        check_judge_model(JudgeModel(model=str(tmp_path)), store)
    with pytest.raises(SettingsError, match=r"^scorer\.model: .*/nowhere: no such folder"):
        check_judge_model(JudgeModel(model=str(tmp_path / "nowhere")), store)
    with pytest.raises(
        ArtifactError, match=r"^model: mine@2: experiment mine has no checkpoint of iteration 2"
    ):
        check_judge_model(JudgeModel(model="mine@2"), store)
